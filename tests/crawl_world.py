"""Open Images' tables with one box of each photo, for photos that lie elsewhere; crawls of them, and what these leave."""

import asyncio
import csv
import gc
import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from pbe_core.errors import run_program
from pbe_core.progress import Progress
from pbe_core.settings import REPOSITORY, preset
from pipelines import crawl
from pipelines.config import BuildSettings
from pipelines.crawling.rounds import Round
from pipelines.crawling.wanted import PhotoSource
from pipelines.crawling.workers import CrawlWorker, Stop

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


@dataclass
class Done:
    """What a program that ran in this process left: as `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def call(program: ModuleType, options: Sequence[str]) -> Done:
    """A program's main in this process, with the Ray that runs here."""
    arguments = [f"{program.__name__}.py", "--config", str(preset("tiny")), *options]
    with (
        patch.object(sys, "argv", arguments),
        redirect_stdout(io.StringIO()) as said,
        redirect_stderr(io.StringIO()) as warned,
        pytest.raises(SystemExit) as ended,
    ):
        run_program(program.main)
    return Done(int(ended.value.code or 0), said.getvalue(), warned.getvalue())


def call_crawl(options: Sequence[str], status: int = 0) -> Done:
    """Crawl in this process; it must end with this status."""
    done = call(crawl, options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def crawl_here(
    chosen: Round, sources: Sequence[PhotoSource], settings: BuildSettings, progress: Progress, stop: Stop
) -> dict[int, str]:
    """In place of `workers.crawl_on_ray`: its worker, in this process, where starting Ray and its actors would take seconds."""

    async def run() -> list[str]:
        # Without `ready`, as work comes to a worker that Ray has started again.
        worker = CrawlWorker(chosen, sources, settings)
        try:
            return await asyncio.gather(*(worker.work(unit) for unit in range(len(chosen.sizes))))
        finally:
            await worker.fetcher.__aexit__(None, None, None)

    garbage = gc.get_threshold()
    try:
        errors = asyncio.run(run())
    finally:
        gc.set_threshold(*garbage)
        gc.unfreeze()
    return {unit: error for unit, error in enumerate(errors) if error}


def rows_of(store: Path, name: str) -> dict[str, dict[str, Any]]:
    """A table of a store, by photo."""
    rows = pq.read_table(store / f"{name}.parquet").to_pylist()
    assert len({row["photo_id"] for row in rows}) == len(rows), f"{name}: a photo twice"
    return {row["photo_id"]: row for row in rows}


def codes_of(store: Path) -> dict[str, str]:
    """What became of each photo."""
    return {photo: row["code"] for photo, row in rows_of(store, "status").items()}


def summary_of(done: Done) -> dict[str, int]:
    """The printed table: outcome -> photos."""
    found = re.findall(r"^│ (\S+|not asked for yet) +│ +([\d,]+) │", done.stdout, re.MULTILINE)
    return {outcome: int(count.replace(",", "")) for outcome, count in found}


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
