"""kill -9 of an evaluation at random moments: scores and pictures must come out as if nothing had been, and none twice.

    python -m tests.faults.kill_evaluation --kills 10

A tiny model is evaluated on a set of pairs, by one process and by two ranks, and killed again and again while it paints, looks
and scores, each time started anew. An evaluation that comes to its end before all kills are spent is compared, and the next one
begins. Every picture and every score must be those of the undisturbed evaluation; a picture that was there when its process died
must be the same file ever after; and no temporary file may stay. Prints a line for each kill, and ends with an AssertionError if
anything is wrong.
"""

import argparse
import os
import random
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from pbe_train import evaluate
from pbe_train.train import train
from pbe_train.training.distributed import Distributed
from tests.pbe_train.pair_worlds import make_cocoee
from tests.pbe_train.programs import FORKS
from tests.pbe_train.small_world import make_world

PAIRS = 24
# Of the moments, so many lie in the first second, before there is a picture.
_EARLY = 0.15


@dataclass(frozen=True)
class Painting:
    """What is started: this model, these pairs, so many ranks."""

    model: Path
    pairs: Path
    ranks: int
    batch: int

    def start(self, out: Path) -> list[ForkServerProcess]:
        """One process a rank, forked from one that has imported everything, as an import takes seconds."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [FORKS.Process(target=evaluate_here, args=(self, out, rank, port)) for rank in range(self.ranks)]
        for process in processes:
            process.start()
        return processes


def evaluate_here(what: Painting, out: Path, rank: int, port: int) -> None:
    """What one rank does, as torchrun starts it; on one thread of the CPU, since two add up in another order each time."""
    ranks = {"RANK": rank, "WORLD_SIZE": what.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **{name: str(value) for name, value in ranks.items()}}
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        given = {"model": f"run={what.model}", "pairs": what.pairs, "out": out, "batch": what.batch}
        fixed = {"guidance": 2, "steps": 3, "replicates": 20, "threads": 1}
        sys.argv = ["evaluate", *(f"--{name}={value}" for name, value in {**given, **fixed}.items())]
        evaluate.main()


def run(kills: int, ranks: int, seed: int, folder: Path, batch: int = 2) -> list[int]:
    """The undisturbed painting, then those that are hit; how many pictures there were at each kill.

    Until all kills are spent and one of them came in the middle, however fast the machine is.
    """
    rng, hit = random.Random(seed), []
    what = Painting(make_model(folder / "model"), make_cocoee(folder / "pairs", range(PAIRS)), ranks, batch)
    finish(what, folder / "calm")
    calm = contents(folder / "calm")
    assert {"evaluation.json", "index.html"} < calm.keys()
    number = 0
    while len(hit) < kills or not any(0 < pictures < PAIRS for pictures in hit):
        out = folder / f"painting-{(number := number + 1)}"
        hit += kill_one(what, out, max(1, kills - len(hit)), rng)
        assert contents(out) == calm, f"{out}: not what an undisturbed evaluation leaves"
    return hit


def kill_one(what: Painting, out: Path, kills: int, rng: random.Random) -> list[int]:
    """Kill a painting at most so often, and let it come to its end; how many pictures there were at each kill."""
    hit: list[int] = []
    kept: dict[str, tuple[int, int]] = {}
    while len(hit) < kills:
        processes, there = what.start(out), len(stamps(out))
        enough = there + rng.randint(0, max(1, (PAIRS - there) // 2)) if there < PAIRS else PAIRS + 1
        late = time.monotonic() + (rng.uniform(0, 1.5) if there == PAIRS or rng.random() < _EARLY else 1e9)
        while any(one.is_alive() for one in processes) and len(stamps(out)) <= enough and time.monotonic() < late:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        # A batch system kills all ranks; memory that runs out kills one.
        for process in processes if rng.random() < 0.6 else rng.sample(processes, 1):
            process.kill()
        # As torchrun does, which waits a while: the others may wait for the one that is gone.
        for process in processes:
            process.join(2)
            process.kill()
            process.join()
        killed = any(process.exitcode for process in processes)
        kept = check_kept(out, kept)
        if not killed:  # It was faster.
            return hit
        hit.append(len(kept))
        left = len(list(out.rglob(".*.tmp")))
        print(f"{out.name}, {what.ranks} ranks: killed at {len(kept)} of {PAIRS} pictures, {left} half written")
    finish(what, out)
    check_kept(out, kept)
    return hit


def check_kept(out: Path, kept: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The pictures that are there now; those that were there before must be the same files."""
    now = stamps(out)
    assert {name: now.get(name) for name in kept} == kept, f"{out}: a picture was painted twice"
    return now


def finish(what: Painting, out: Path) -> None:
    """A painting that nothing disturbs."""
    for process in what.start(out):
        process.join()
        assert process.exitcode == 0


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a picture has been written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / "pictures" / "run").glob("[0-9]*.png")}


def contents(out: Path) -> dict[str, bytes]:
    """All files, and what is left over of half written ones, too."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def make_model(folder: Path) -> Path:
    """A tiny model: a run of one step."""
    world = make_world(folder / "world")
    train(world.settings(folder / "run", "--steps=1"), Distributed(0, 1, torch.device("cpu")))
    return folder / "run"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of one process, and as many of two ranks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    given = parser.parse_args()
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory(prefix="kill-evaluation-") as folder:
            hit = run(given.kills, ranks, given.seed, Path(folder))
        print(f"{len(hit)} kills of {ranks} ranks: the scores and bytes of an undisturbed evaluation, and no picture twice")


if __name__ == "__main__":
    main()
