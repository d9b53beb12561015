"""A dataset behind a URL: its tables come to the machine that builds, and what that one makes of them goes back.

    URL ──fetch_tables──▶ work folder ──select, plan──▶ share_tables ──▶ URL ──▶ the nodes that pack

The records go last each time, and an old selection.json goes away before: behind the URL, too, the tables of a plan are whole
where their record is there.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from pbe_core.errors import InputError
from pbe_core.files import file_sha256, write_atomically
from pbe_core.storage import RemoteFolder
from pipelines.dataset.write_plan import foreign_shards

TABLES = ("objects.parquet", "rejects.parquet", "same_photos.parquet", "plan.parquet", "index.parquet")
RECORDS = ("estimate.json", "selection.json", "plan.json", "dataset.json")


def fetch_tables(remote: RemoteFolder, work: Path) -> None:
    """Bring what a build starts from: tables and records that are not here, or here as they were.

    Raises:
        InputError: the URL cannot be reached.
    """
    remote.check(writing=True)
    _check_ours(remote)
    sizes = remote.sizes()
    here = remote.read_all(name for name in RECORDS if name in sizes)
    same = all(_content(work / name) == here.get(name) for name in RECORDS)
    hashes = _recorded_hashes(here.get("selection.json"))
    if not same:
        for name in RECORDS:  # One that is only here would tell of a dataset that was removed there.
            (work / name).unlink(missing_ok=True)
    for name in (*TABLES, *RECORDS):
        path = work / name
        if name not in sizes:
            continue
        if name in hashes:
            here_already = path.is_file() and file_sha256(path) == hashes[name]
        else:
            here_already = same and path.is_file() and path.stat().st_size == sizes[name]
        if not here_already:
            remote.download(name, path)


def fetch_plan(remote: RemoteFolder, work: Path) -> None:
    """Bring what a node packs from, where it is not here already: the plan, as selection.json tells it, and the plan's record.

    Raises:
        OSError: what came is not what is recorded.
    """
    records = remote.read_all(("selection.json", "plan.json"))
    right = _recorded_hashes(records["selection.json"])["plan.parquet"]
    plan = work / "plan.parquet"
    if not (plan.is_file() and file_sha256(plan) == right):
        remote.download(plan.name, plan)
        if file_sha256(plan) != right:
            raise OSError(f"{remote.url}/plan.parquet is not what selection.json says (SHA-256)")
    write_atomically(work / "plan.json", records["plan.json"])


def share_tables(remote: RemoteFolder, work: Path) -> None:
    """Bring the tables of a frozen plan to the URL, where they are not there yet."""
    records = remote.read_all(RECORDS)
    if all(records.get(name) == _content(work / name) for name in ("selection.json", "plan.json")):
        return
    remote.remove("selection.json")
    share(remote, work, (*(name for name in TABLES if name != "index.parquet"), "selection.json", "plan.json"))


def share(remote: RemoteFolder, work: Path, names: Iterable[str]) -> None:
    """Bring files to the URL, in this order, where they are here."""
    for name in names:
        if (work / name).is_file():
            remote.upload(work / name, name)


def _check_ours(remote: RemoteFolder) -> None:
    """Raises InputError where shards lie that no build of ours left: they could be overwritten."""
    if remote.sizes("shards") and not remote.read_all(("plan.json", "selection.json")):
        raise InputError(foreign_shards(f"{remote.url}/shards"))


def _recorded_hashes(selection: bytes | None) -> dict[str, str]:
    """Table -> SHA-256; none where the record cannot be read, which is told when it is used."""
    try:
        hashes: dict[str, str] = json.loads(selection or b"{}").get("sha256", {})
    except ValueError:
        return {}
    return hashes


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
