"""What one takes home of an edit: its settings, and a zip with all files that went into it and came out."""

import asyncio
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, BinaryIO

from aiohttp import web

from pbe_core.files import file_sha256
from pbe_train.app.edit_queue import Edit
from pbe_train.editing.edit_settings import EditSettings, LoraRecord, ModelRecord, PictureRecord

HOW_COMPUTED = ("size", "precision", "channels_last", "prepacked", "compile", "device", "threads")

_AT_ONCE = 1 << 20
_LONGEST = 60
_WITH_SUFFIX = re.compile(r"(.+)(\.[A-Za-z0-9]{1,5})")
_NO_NAMES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
"""What Windows takes for a device."""


def safe_names(names: Sequence[str], results: int) -> list[str]:
    """File names that no system trips over, each once, and none that the app itself gives to a file of an edit.

    Args:
        names: as people gave them.
        results: how many results there will be.
    """
    taken = {"settings.json", "preview.jpg", "preview.tmp", *(f"result-{number}.png" for number in range(results))}
    safe = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).lstrip(".-")
        parts = _WITH_SUFFIX.fullmatch(plain)
        stem, suffix = parts.groups() if parts else (plain, "")
        stem = stem[:_LONGEST].rstrip(".") or "file"
        if _NO_NAMES.fullmatch(stem):
            stem = f"_{stem}"
        number, made = 1, stem + suffix
        while made.lower() in taken:
            number += 1
            made = f"{stem}-{number}{suffix}"
        taken.add(made.lower())
        safe.append(made)
    return safe


def settings_of(edit: Edit, remote: bool) -> str:
    """The settings.json of an edit that has begun.

    Args:
        edit: with the facts of its model.
        remote: whether the reader may be on another machine: then a path of this one is left out.
    """

    def told(source: str) -> str | None:
        return None if remote and Path(source).expanduser().is_absolute() else source

    made = EditSettings(
        model=ModelRecord(name=edit.choice.name, source=told(edit.facts["source"]), sha256=edit.facts["sha256"]),
        loras=[
            LoraRecord(name=Path(lora["source"]).name, **{**lora, "source": told(lora["source"])})
            for lora in edit.facts.get("loras", [])
        ],
        photo=_record(edit, edit.photo),
        mask=_record(edit, edit.mask),
        references=[_record(edit, name) for name in edit.references],
        **edit.how,
        **{
            name: edit.facts[name] for name in ("size", "precision", "channels_last", "prepacked", "compile", "device", "threads")
        },
    )
    return made.model_dump_json(indent=1) + "\n"


def _record(edit: Edit, name: str) -> PictureRecord:
    return PictureRecord(name=name, sha256=file_sha256(edit.folder / name))


async def write_archive(edit: Edit, remote: bool, response: web.StreamResponse) -> None:
    """Send the zip piece by piece; pictures are compressed already."""
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w") as archive:
        results = [f"result-{number}.png" for number in range(edit.results)]
        for name in (edit.photo, edit.mask, *edit.references, *results):
            with (edit.folder / name).open("rb") as file, archive.open(name, "w", force_zip64=True) as member:
                while await asyncio.to_thread(_copy_some, file, member):
                    await response.write(outlet.take())
        archive.writestr("settings.json", await asyncio.to_thread(settings_of, edit, remote))
    await response.write(outlet.take())
    await response.write_eof()


def _copy_some(source: BinaryIO, target: IO[bytes]) -> int:
    return target.write(source.read(_AT_ONCE))


class _Outlet(io.RawIOBase):
    """A file that can be written to the end only, and gives away what was written."""

    def __init__(self) -> None:
        self.pending = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.pending += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self.pending)
        self.pending.clear()
        return taken
