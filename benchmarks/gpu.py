"""All that is to be measured on a GPU, in one command, for whoever has one for half an hour.

Usage:  python -m benchmarks.gpu --minutes 25
        python -m benchmarks.gpu --minutes 9 --parts environment parity ladder
        python -m benchmarks.gpu --device cpu --preset tiny --minutes 0.2    # a rehearsal: does everything run?

    environment   versions, and what the device does at best
    parity        whether steps repeated from a CUDA graph (train.cuda_graph) are the plain ones, to the bit
    ladder        training steps: plain, + bf16, + channels-last, + compile, + one-token, + CUDA graph, larger batches; the
                  fastest then for a minute or longer, waited for at both ends
    loop          the trainer's own step from shards: waiting for data, and what a checkpoint holds up
    edits         one edit by the library
    tiers         peak memory of the presets for small GPUs, beside what `pbe cost` counts
    latents       latents that lie ready, beside encoding in each step
    encoder       the VAE's encoder by precision
    tiny          a training of the tiny preset, with pictures

Each part is a process of its own and leaves benchmarks/results/gpu.<device>/PART.json, written after each row, with `done` or
what went wrong. A part that is done is not measured again (but with --again), so that the same command goes on where it was
stopped; ladder and tiny go on within themselves. The time is shared out in this order of worth, ten minutes a part at most, and a
part that would begin too late is left out.

Nothing is downloaded, and all weights are random but for the tiny preset's, which are in the repository. Datasets are made
before, on any machine: parity and tiny train on the tiny one (`make shards`), and loop reads one whose views have the preset's
size, by --dataset (`python -m benchmarks.loader --keep FOLDER` makes one of drawn photos). On a machine without a network, bring
what an image with PyTorch and transformers lacks as wheels:

    pip download --dest wheels --constraint constraints.txt --only-binary=:all: --python-version 3.12 --no-deps \\
        diffusers pydantic pydantic-core pydantic-settings typing-inspection annotated-types python-dotenv tenacity \\
        webdataset braceexpand pycocotools
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site:.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import RESULTS, today
from pbe_core.errors import InputError, run_program
from pbe_core.files import write_atomically
from pbe_core.machine import cpu_name
from pbe_core.settings import REPOSITORY

PARTS = {
    "environment": 0.5,
    "parity": 1.0,
    "ladder": 9.0,
    "loop": 3.0,
    "edits": 1.5,
    "tiers": 1.5,
    "latents": 2.0,
    "encoder": 1.0,
    "tiny": 5.5,
}
"""In order of worth, with their shares of the time (minutes of 25)."""
LONGEST_SECONDS = 570
GPU_ALONE = ("parity",)
# A part is given so many times its seconds before it is ended, and so many more to load what it needs.
PATIENCE, LOADING_SECONDS = 1.3, 60


def main() -> None:
    """Read the command line, and measure part by part."""
    given = parse()
    folder = results_folder(given.out, gpu_name() if given.device == "cuda" else cpu_name())
    folder.mkdir(parents=True, exist_ok=True)
    if given.device == "cpu":
        load()
    gpu, began = given.device == "cuda", time.monotonic()
    for number, part in enumerate(given.parts):
        path = folder / f"{part}.json"
        # A rehearsal comes to its end, however slow the machine is.
        left = 60 * given.minutes - gpu * (time.monotonic() - began)
        shares = [PARTS[one] for one in given.parts[number * gpu :]]
        seconds = min(left * PARTS[part] / sum(shares), LONGEST_SECONDS / PATIENCE - LOADING_SECONDS)
        if part in GPU_ALONE and not gpu:
            print(f"{part}: left out, it takes a GPU", flush=True)
        elif is_done(path) and not given.again:
            print(f"{part}: done before", flush=True)
        elif left <= 0:
            print(f"{part}: left out, the time is up; the same command goes on", flush=True)
        else:
            print(f"{part}: {seconds:.0f} s", flush=True)
            if given.again:
                path.unlink(missing_ok=True)
            in_own_process(part, given, folder, seconds, PATIENCE * seconds + LOADING_SECONDS if gpu else None)
    Console().print(table_of([json.loads(path.read_bytes()) for part in PARTS if (path := folder / f"{part}.json").is_file()]))


def parse() -> argparse.Namespace:
    """The command line. Raises InputError where it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="some only (default: all)")
    parser.add_argument("--again", action="store_true", help="measure parts that are done once more")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--preset", default="open_images", help="whose model is measured (default: %(default)s)")
    parser.add_argument("--tiny", type=Path, default=REPOSITORY / "data/tiny/dataset", help="the tiny preset's dataset")
    parser.add_argument("--dataset", type=Path, help="dataset for loop (default: of --preset tiny the tiny one, else none)")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder of trainings (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    given = parser.parse_args()
    if not 0 <= given.minutes < float("inf"):
        raise InputError(f"--minutes {given.minutes:g}: no time that can be shared out")
    if given.device == "cuda" and not gpu_name():
        raise InputError("--device cuda: no GPU here; rehearse with --device cpu --preset tiny --minutes 0.2")
    given.parts = [part for part in PARTS if part in given.parts]
    if given.dataset is None:
        given.dataset = given.tiny if given.preset == "tiny" else Path("data/open_images/dataset")
    return given


def gpu_name() -> str:
    """What the driver calls the first GPU; empty where there is none. PyTorch takes seconds to load."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        # Where its driver is not there, it says so on stdout, and has another status.
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told[0].strip() if told else ""


def results_folder(out: Path, device: str) -> Path:
    """Where the parts of a device are kept."""
    return out / f"gpu.{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}"


def is_done(path: Path) -> bool:
    """Whether a part was measured to its end."""
    return path.is_file() and bool(json.loads(path.read_bytes())["done"])


def load() -> None:
    """Start the server that a rehearsal's parts are forked from, so that what they have in common is loaded once."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["benchmarks.gpu_parts"])
    first = forks.Process(target=int)
    first.start()
    first.join()


def in_own_process(part: str, given: argparse.Namespace, folder: Path, seconds: float, patience: float | None) -> None:
    """Run a part, and say how it ended; one that takes longer than `patience` (s) is ended."""
    # A process that was forked cannot use a GPU that its parent has so much as asked for.
    kind = multiprocessing.get_context("spawn" if given.device == "cuda" else "forkserver")
    process = kind.Process(target=run_part, args=(part, given, folder, seconds))
    process.start()
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
    record = Record(folder / f"{part}.json", part, given.preset)
    if not record.content["done"] and not record.content["error"]:
        record.fail(f"ended by {'its time' if process.exitcode == -9 else f'status {process.exitcode}'}")
    if record.content["error"]:
        print(f"{part}: failed: {record.content['error'].splitlines()[-1]}", flush=True)


def run_part(part: str, given: argparse.Namespace, folder: Path, seconds: float) -> None:
    """In the process of a part: measure it."""
    from benchmarks import gpu_parts
    from pbe_train.data.training_dataset import kill_workers

    record = Record(folder / f"{part}.json", part, given.preset)
    record.begin()
    work = given.work.resolve()
    task = gpu_parts.Task(given.device, given.preset, seconds, given.dataset, given.tiny, work, folder)
    try:
        gpu_parts.check(task, part)
        getattr(gpu_parts, part)(task, record.keep)
    except InputError as error:
        record.fail(str(error))
    except Exception:  # Whatever it is: the other parts are worth measuring.
        record.fail(traceback.format_exc())
    else:
        record.finish()
    finally:
        kill_workers()  # What is registered with atexit is not called in such a process, which would wait for them.


class Record:
    """The JSON of a part: `{"part", "preset", "date", "seconds", "done", "error", "rows"}`, written after each change."""

    def __init__(self, path: Path, part: str, preset: str) -> None:
        self.path = path
        new = {"part": part, "preset": preset, "date": today(), "seconds": 0.0, "done": False, "error": None, "rows": []}
        self.content: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else new
        self._began = time.monotonic()
        self._before = self.content["seconds"]

    def begin(self) -> None:
        """Forget what went wrong in an earlier call; its rows stay."""
        self._write(error=None, done=False, date=today())

    def keep(self, row: dict[str, Any]) -> None:
        """Add a row, in the place of one that says the same."""
        others = [one for one in self.content["rows"] if one["what"] != row["what"]]
        self._write(rows=[*others, row])
        print(f"    {row['what']}: {figure_of(row)}", flush=True)

    def fail(self, error: str) -> None:
        """Say what went wrong."""
        self._write(error=error)

    def finish(self) -> None:
        """It is done."""
        self._write(done=True)

    def _write(self, **changes: Any) -> None:
        self.content |= {**changes, "seconds": round(self._before + time.monotonic() - self._began, 3)}
        write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())  # Ctrl-C may come at any time.


def figure_of(row: dict[str, Any]) -> str:
    """A row's figure in words."""
    return f"{row['figure']:g} {row['unit']}".strip() if row["figure"] is not None else row.get("error") or "none"


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """The table to print."""
    table = Table("part", "what", "figure", "goal", "more")
    for record in records:
        for row in record["rows"]:
            mfu = f"MFU {row['mfu']:.1%}" if row.get("mfu") else ""
            memory = f"{row['peak_memory_gb']:.1f} GB" if row.get("peak_memory_gb") else ""
            table.add_row(record["part"], row["what"], figure_of(row), row["goal"], "  ".join(filter(None, (mfu, memory))))
        if record["error"]:
            table.add_row(record["part"], "failed", "", "", record["error"].splitlines()[-1])
    return table


if __name__ == "__main__":
    run_program(main)
