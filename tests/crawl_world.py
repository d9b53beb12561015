"""Annotations of photos that lie elsewhere: Open Images' tables with one box of each photo, and the crawl's command."""

import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from pbe_core.settings import REPOSITORY

LABEL = "/m/01yrx"


def write_tables(folder: Path, urls: Mapping[str, str], metadata: Mapping[str, Mapping[str, object]] | None = None) -> Path:
    """Write the tables of train photos, as Open Images does.

    Args:
        folder: for the tables.
        urls: photo id -> OriginalURL.
        metadata: photo id -> further cells of its row: OriginalMD5, OriginalSize, Thumbnail300KURL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    boxes = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax"]
    flags = ["IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]
    known = ["ImageID", "Subset", "OriginalURL", "License", "Author", "OriginalSize", "OriginalMD5", "Thumbnail300KURL"]
    _write(
        folder / "train-annotations-bbox.csv",
        [*boxes, *flags],
        [[photo, "xclick", LABEL, 1, 0.2, 0.7, 0.2, 0.7, 0, 0, 0, 0, 0] for photo in urls],
    )
    rows = [
        {"ImageID": photo, "Subset": "train", "OriginalURL": url, **(metadata or {}).get(photo, {})}
        for photo, url in urls.items()
    ]
    _write(folder / "train-images-boxable-with-rotation.csv", known, [[row.get(name, "") for name in known] for row in rows])
    (folder / "class-descriptions-boxable.csv").write_text(f"{LABEL},Cat\n")
    return folder


def crawl_options(
    tables: Path,
    store: Path,
    out: Path,
    port: int | None,
    sources: Sequence[str] = ("{url}",),
    others: Mapping[str, object] = MappingProxyType({}),
) -> list[str]:
    """Options of a crawl that waits for nothing but what a server does; no limit of time is near, however busy the machine.

    Args:
        tables: folder of `write_tables`.
        store: folder of the photo store.
        out: folder of the dataset.
        port: of 127.0.0.1 that may be asked.
        sources: `crawl.sources`.
        others: further options, or these with other values: {"crawl.workers": 1}.
    """
    options = {
        "source.annotations": tables,
        "source.photos": store,
        "source.splits": '["train"]',
        "out": out,
        "crawl.sources": json.dumps(sources),
        "crawl.contact": "tests@example.org",
        "crawl.total_seconds": 600,
        "crawl.slow_bytes_per_second": 1,
        "crawl.max_bytes": 3_000_000,
        "crawl.attempts": 2,
        "crawl.photos_per_part": 50,
        "crawl.per_host.requests_per_second": 100_000,
        "crawl.per_host.concurrency": 64,
        "crawl.per_host.failures": 100_000,
        **({"crawl.allowed_addresses": f'["127.0.0.1:{port}"]'} if port else {}),
        **others,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def crawl_command(options: Sequence[str]) -> list[str]:
    """`python pipelines/crawl.py` with the tiny preset, as a user starts it."""
    return [sys.executable, "pipelines/crawl.py", "--config", "configs/tiny.yaml", *options]


def run_crawl(options: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a crawl to its end."""
    done = subprocess.run(crawl_command(options), cwd=REPOSITORY, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
