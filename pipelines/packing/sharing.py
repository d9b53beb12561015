"""A dataset behind a URL: its tables come to the machine that builds, and what that one makes of them goes back.

    URL ──fetch_tables──▶ work folder ──select, plan──▶ share_tables ──▶ URL ──▶ the nodes that pack

The records go last each time, and an old selection.json goes away before: behind the URL, too, the tables of a plan are whole
where their record is there.
"""

from collections.abc import Iterable
from pathlib import Path

from schemas.remote import RemoteFolder

TABLES = ("objects.parquet", "rejects.parquet", "same_photos.parquet", "plan.parquet", "index.parquet")
RECORDS = ("estimate.json", "selection.json", "plan.json", "dataset.json")


def fetch_tables(remote: RemoteFolder, work: Path) -> None:
    """Bring what a build starts from: tables and records that are not here, or here as they were.

    Raises:
        InputError: the URL cannot be reached.
    """
    remote.check()
    sizes = remote.sizes()
    here = remote.read_all(name for name in RECORDS if name in sizes)
    same = all(_content(work / name) == here.get(name) for name in RECORDS)
    if not same:
        for name in RECORDS:  # One that is only here would tell of a dataset that was removed there.
            (work / name).unlink(missing_ok=True)
    for name in (*TABLES, *RECORDS):
        path = work / name
        if name in sizes and not (same and path.is_file() and path.stat().st_size == sizes[name]):
            remote.download(name, path)


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


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
