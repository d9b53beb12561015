"""The same dataset by 1, 2 and 4 workers, in one go and in three interrupted ones: every shard must have the same SHA-256.

    python -m tests.faults.same_bytes                                  # the tiny world
    python -m tests.faults.same_bytes --real-data FOLDER               # FOLDER/open_images_mini, real photos at 512 px

Interrupted by SIGKILL to the program, when about a third and two thirds of the shards are done. Prints the hashes; status 1 if
two differ.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.kill_build import VAE, build_command, hashes_of, recorded, wait_until
from tests.faults.marked import MarkedProcesses
from tiny_world.make_photos import make_world

WORKERS = (1, 2, 4)


def real_command(data: Path, out: Path, actors: int) -> list[str]:
    """A build of real photos with the paper's settings, but for a small VAE."""
    source = ["--source.annotations", str(data), "--source.photos", str(data), "--out", str(out), "--latents.vae", VAE]
    ray = ["--ray.cpus_per_actor", "0.25", "--ray.gpus_per_actor", "0", "--ray.actors", str(actors)]
    config = ["--config", "configs/open_images.yaml", "--shards.samples", "10"]
    return [sys.executable, "pipelines/build.py", *config, *source, *ray]


def build(command: list[str], out: Path, stops: list[int]) -> None:
    """Run to the end, after a SIGKILL at each of these numbers of done shards."""
    with MarkedProcesses(command, out.with_suffix(".log")) as builds:
        for stop in stops:
            process = builds.start()
            wait_until(lambda enough=stop, one=process: len(recorded(out)) >= enough or one.poll() is not None)
            process.kill()
            process.wait()
        process = builds.start()
        if process.wait():
            raise RuntimeError(f"the build ended with status {process.returncode}:\n{builds.log.read_text()[-3000:]}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-data", type=Path, help="folder with open_images_mini; without it, the tiny world is built")
    parser.add_argument("--photos", type=int, default=60, help="photos of the tiny world (default: %(default)s)")
    given = parser.parse_args()
    columns: dict[str, dict[str, str]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        folder = Path(scratch)
        photos = folder / "photos"
        if not given.real_data:
            make_world(photos, given.photos, given.photos // 4, 7, 1)
        for goes in ("one go", "three goes"):
            for workers in WORKERS:
                name = f"{workers} worker{'s' * (workers > 1)}, {goes}"
                out = folder / name.replace(" ", "-").replace(",", "")
                real = given.real_data and real_command((given.real_data / "open_images_mini").resolve(), out, workers)
                shards = len(next(iter(columns.values()), {})) // 2
                began = time.monotonic()
                build(
                    real or build_command(photos, out, workers), out, [shards // 3, 2 * shards // 3] if goes != "one go" else []
                )
                seconds[name] = time.monotonic() - began
                columns[name] = hashes_of(out)
                print(f"{name}: {len(columns[name])} files, {seconds[name]:.0f} s", file=sys.stderr)
    first = next(iter(columns.values()))
    table = Table(title="SHA-256 of each file, and the builds that made it", title_justify="left")
    for heading in ("file", "SHA-256", "builds"):
        table.add_column(heading, no_wrap=True)
    wrong = 0
    for name in sorted({name for files in columns.values() for name in files}):
        by_hash: dict[str, list[str]] = {}
        for build_name, files in columns.items():
            by_hash.setdefault(files.get(name, "not there"), []).append(build_name)
        wrong += len(by_hash) > 1
        for sha256, makers in by_hash.items():
            table.add_row(name, sha256, "all" if len(makers) == len(columns) else "; ".join(makers))
    Console(width=140).print(table)
    print(f"{len(first)} files of {len(columns)} builds: " + (f"{wrong} differ" if wrong else "all the same, byte for byte"))
    return 1 if wrong or not first else 0


if __name__ == "__main__":
    sys.exit(main())
