"""The folder of an export: whole or not there, and never in the place of something else."""

import glob
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.files import file_sha256, sweep, sync, temporary_folder
from pbe_train.checkpoints.record import RECORD


def check_free(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier export of this program.

    Raises:
        InputError: with what is there.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not there:
        return
    record = folder / RECORD
    try:
        known = {RECORD, *json.loads(record.read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--out {folder}: is not empty, and no export of this program; give another folder") from None
    if foreign := there - known:
        raise InputError(
            f"--out {folder}: an earlier export, but {min(foreign)} is not of it and would be lost; give another folder"
        )


@contextmanager
def new_export(folder: Path, told: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; after the block it takes that name, with a record of all its files.

    An earlier export goes only when the new one is whole and on disk. On an exception nothing has changed.

    Args:
        folder: the export's.
        told: what else the record should say.

    Raises:
        InputError: the place holds something else.
    """
    folder = folder.absolute()  # `.` has no name.
    _take_up(folder)
    check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written to ({error.strerror}); give another place") from None
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.old")
    with temporary_folder(folder.parent, folder.name) as partial:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        record = {str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
        (partial / RECORD).write_text(json.dumps({**told, "files": record}, indent=1) + "\n", encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        try:
            if folder.exists():
                folder.rename(aside)
            partial.rename(folder)
        except BaseException:  # An interrupt too must not leave the name without an export.
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            raise
        finally:
            if folder.exists():
                shutil.rmtree(aside, ignore_errors=True)
        sync(folder.parent)


def _take_up(folder: Path) -> None:
    """Tidy up after exports to this place that were killed; one that had moved the earlier export aside gives it back."""
    sweep(folder.parent, folder.name)
    for aside in folder.parent.glob(f".{glob.escape(folder.name)}.*.old"):
        if not folder.exists():
            aside.rename(folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)
