"""A run that is stopped, killed or moved to other ranks is the run that it would have been: the same bytes, the same samples."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pbe_core.settings import REPOSITORY
from pbe_train.checkpoints.trainer_checkpoint import list_checkpoints
from pbe_train.train import train
from pbe_train.training import distributed, setup
from pbe_train.training.distributed import Distributed, Stop
from tests.pbe_train import programs
from tests.pbe_train.programs import read_records, record_to, start_ranks
from tests.pbe_train.small_world import World

PATIENCE_SECONDS = 900  # Ends what hangs; how fast the machine is has no say.
STEPS = 12
PARTS = ("model", "ema", "optimizer")
# What a line of metrics says about the machine and not about the run.
TIMES = {"samples_per_second", "data_wait"}


def straight(world: World, out: Path, *options: str) -> Path:
    """A run that nothing stops, in this process; it leaves the generator of the tests as it found it."""
    with torch.random.fork_rng():
        train(world.settings(out, *options), Distributed(0, 1, torch.device("cpu")))
    return out


def what_was_computed(out: Path, step: int = STEPS) -> dict[str, object]:
    """Bytes of weights, average and moments of a checkpoint, and all metrics but times."""
    files = {part: (out / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors").read_bytes() for part in PARTS}
    return {**files, "metrics": metrics(out)}


def metrics(out: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def newest(out: Path) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    saved = list_checkpoints(out)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def partial(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".step-*.partial"))


class Runs:
    """One command, `python pbe_train/train.py`, started over and over. Ends what it started. A context manager."""

    def __init__(self, world: World, out: Path, *options: str) -> None:
        self.out = out
        self.log = out.with_suffix(".log")
        self.options = ["--config", str(world.config), "--out", str(out), *options]
        self.processes: list[ForkServerProcess] = []

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        end(self.processes)

    def start(self) -> ForkServerProcess:
        self.processes.append(programs.start(self.options, self.log))
        return self.processes[-1]

    def kill_when(self, moment: Callable[[], object]) -> None:
        """Kill with SIGKILL at a moment. The process is halted first, so that the moment is still there when it dies."""
        process = self.start()
        halted = psutil.Process(process.pid)
        while True:
            wait_until(lambda: moment() or not process.is_alive())
            assert process.is_alive(), f"it ended too early: {self.log.read_text()}"
            halted.suspend()
            wait_until(lambda: halted.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
            if moment() and process.is_alive():
                break
            halted.resume()
        workers = halted.children()
        halted.kill()
        assert status(process) == -signal.SIGKILL
        _, alive = psutil.wait_procs(workers, PATIENCE_SECONDS)
        assert not alive, "a loader's processes end with the training"

    def finish(self) -> None:
        """The same command, to its end."""
        assert status(self.start()) == 0, self.log.read_text()


def status(process: ForkServerProcess) -> int | None:
    process.join(PATIENCE_SECONDS)
    return process.exitcode


def end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def wait_until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.0005)


def test_a_killed_run_goes_on_bit_for_bit(world: World, tmp_path: Path):
    """12 steps = 5, kill -9, 7; an epoch ends after step 6, and the line of metrics for steps 4 to 6 straddles the kill."""
    options = [f"--steps={STEPS}", "--checkpoint_every=5", "--log_every=3"]
    with Runs(world, tmp_path / "killed", *options) as runs:
        runs.kill_when(lambda: newest(runs.out) == 5)
        runs.finish()
    assert what_was_computed(runs.out) == what_was_computed(straight(world, tmp_path / "straight", *options))
    assert [line["step"] for line in metrics(runs.out) if "loss" in line] == [3, 6, 9, 12]


def test_a_kill_while_a_checkpoint_is_written_loses_that_checkpoint_alone(world: World, tmp_path: Path):
    """With two workers, two micro-batches, and steps that straddle epochs (24 samples, 10 a step)."""
    options = [
        f"--steps={STEPS}",
        "--checkpoint_every=1",
        "--keep_last=20",
        "--log_every=5",
        "--global_batch=10",
        "--accumulation=2",
    ]
    with Runs(world, tmp_path / "killed", *options, "--loader.workers=2") as runs:
        runs.kill_when(lambda: newest(runs.out) >= 2 and partial(runs.out))
        at_work = [int(path.name.split(".")[1].removeprefix("step-")) for path in partial(runs.out)]
        reached = newest(runs.out)
        assert at_work == [reached + 1]
        before = what_was_computed(runs.out, reached)["optimizer"]
        runs.finish()
    assert what_was_computed(runs.out, reached)["optimizer"] == before, "it was not made again"
    assert not partial(runs.out)
    assert [path.name for path in list_checkpoints(runs.out)] == [f"step-{step:08d}" for step in range(1, STEPS + 1)]
    assert what_was_computed(runs.out) == what_was_computed(straight(world, tmp_path / "straight", *options))


def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_from_there(world: World, tmp_path: Path):
    """SIGTERM to the program and its workers at once, as a batch system sends it; and again, as torchrun hands it on."""
    steps = 40
    options = [f"--steps={steps}", "--log_every=16", "--checkpoint_every=5", "--loader.workers=2"]
    with Runs(world, tmp_path / "stopped", *options) as runs:
        process = runs.start()
        wait_until(lambda: newest(runs.out) >= 5 or not process.is_alive())
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert status(process) == 128 + signal.SIGTERM, runs.log.read_text()
        reached = newest(runs.out)
        assert 5 <= reached < steps
        assert f"stopped by SIGTERM after step {reached}, which is saved; the same command goes on" in runs.log.read_text()
        runs.finish()
    whole = straight(world, tmp_path / "straight", *options)
    assert what_was_computed(runs.out, steps) == what_was_computed(whole, steps)


def test_who_asks_again_later_does_not_wait_for_a_loader_that_hangs(monkeypatch: pytest.MonkeyPatch):
    """Loader processes do not hear the signals, and are waited for on the way out: the second time they are killed."""
    handlers = {number: signal.getsignal(number) for number in distributed.SIGNALS}
    child = multiprocessing.get_context("fork").Process(target=_deaf, daemon=True)
    child.start()
    with Stop(Distributed(0, 1, torch.device("cpu"))) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGTERM
        assert child.is_alive()
        monkeypatch.setattr(distributed, "SECONDS_APART", -1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    child.join(100)
    assert child.exitcode == -signal.SIGKILL


def test_the_trainer_does_not_import_albumentations():
    """Only the preset `strong` needs it, and it takes two seconds."""
    process = programs.FORKS.Process(target=programs.exit_with_import_of, args=("albumentations",))
    process.start()
    assert status(process) == 0


def _deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


SHARED = [f"--steps={STEPS}", "--global_batch=8", "--checkpoint_every=1", "--keep_last=20", "--log_every=1"]
SHARED += ["--optimizer.gradient_clip=0.1", "--accumulation=2"]


@pytest.fixture(scope="module")
def by_ranks(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of ranks -> folder of a run with so many; that of one rank in this process."""
    root = tmp_path_factory.mktemp("ranks")
    steps = {2: STEPS, 4: 3}
    given = {ranks: ["--config", str(world.config), *SHARED, f"--steps={count}"] for ranks, count in steps.items()}
    given[4].append("--accumulation=1")
    started = {ranks: start_ranks(ranks, given[ranks], root / str(ranks)) for ranks in steps}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_batches", record_to(root / "1" / "records"))
        straight(world, root / "1" / "run", *SHARED)
    try:
        for ranks, processes in started.items():
            assert [status(process) for process in processes] == [0] * ranks, (root / str(ranks) / "log0").read_text()
    finally:
        end([process for processes in started.values() for process in processes])
    return {ranks: root / str(ranks) for ranks in (1, *steps)}


def test_the_samples_do_not_depend_on_the_number_of_ranks(by_ranks: dict[int, Path]):
    """Nor do timesteps, noise, augmentation and dropped conditions of a (step, slot); so the first step's loss is the same."""
    one, two, four = (read_records(by_ranks[ranks] / "records") for ranks in (1, 2, 4))
    assert sorted(one) == [(step, slot) for step in range(STEPS) for slot in range(8)]
    assert one == two
    assert four == {place: what for place, what in one.items() if place[0] < 3}
    assert len({noise for _, _, noise, _ in one.values()}) == len(one), "all noise is different"
    alone = read_records(by_ranks[2] / "records", "start0-rank1-*")
    assert {slot for _, slot in alone} == {4, 5, 6, 7}, "each rank took its own half"
    # AdamW and the clip hide a wrong scale of the gradient; its norm before the clip does not.
    for key in ("loss", "gradient_norm"):
        first = [metrics(folder / "run")[0][key] for folder in by_ranks.values()]
        assert first == pytest.approx([first[0]] * 3, rel=1e-6 if key == "loss" else 1e-4), key


def test_two_ranks_train_one_model(by_ranks: dict[int, Path]):
    """The ranks hold equal weights, and those of one rank up to rounding."""
    first, second = json.loads((by_ranks[2] / "run" / "finished.json").read_text())["weights_sha256"]
    assert first == second
    one, two = (load_file(list_checkpoints(by_ranks[ranks] / "run")[-1] / "model.safetensors") for ranks in (1, 2))
    # AdamW divides by the gradient's size, so that rounding of gradients near zero shows as a step of the learning rate.
    apart = [float((one[name] - two[name]).abs().mean()) for name in one]
    assert max(apart) < 1e-3


def test_a_run_goes_on_with_other_ranks_and_the_same_samples(
    world: World, by_ranks: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two ranks, then one."""
    out = tmp_path / "run"
    shutil.copytree(by_ranks[2] / "run", out)
    for later in list_checkpoints(out)[5:]:
        shutil.rmtree(later)
    monkeypatch.setattr(setup, "load_batches", record_to(tmp_path / "records"))
    straight(world, out, *SHARED)
    whole = read_records(by_ranks[2] / "records")
    assert read_records(tmp_path / "records") == {place: what for place, what in whole.items() if place[0] >= 5}
    both = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (by_ranks[2] / "run", out)]
    assert both[0][:5] == both[1][:5]
    assert both[0][5] == pytest.approx(both[1][5], rel=1e-6)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(world: World, tmp_path: Path):
    processes = start_ranks(2, ["--config", str(world.config), *SHARED, "--steps=1000", "--checkpoint_every=1000"], tmp_path)
    records = tmp_path / "records"
    try:
        wait_until(lambda: len(read_records(records, "start0-rank1-*")) >= 12 or not processes[1].is_alive())
        os.kill(processes[1].pid or 0, signal.SIGTERM)
        assert [status(process) for process in processes] == [128 + signal.SIGTERM] * 2, (tmp_path / "log0").read_text()
    finally:
        end(processes)
    last = [max(read_records(records, f"start0-rank{rank}-*"))[0] for rank in (0, 1)]
    assert last[0] == last[1] == newest(tmp_path / "run") - 1


def test_ranks_are_started_again_by_torchrun(world: World, by_ranks: dict[int, Path], tmp_path: Path):
    """SIGTERM to rank 1 alone, later kill -9 to rank 0; `--max-restarts 2` brings the run of two ranks to its end, to the bit."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    program = [str(REPOSITORY / "tests" / "pbe_train" / "programs.py"), str(tmp_path / "records")]
    settings = ["--config", str(world.config), "--out", str(tmp_path / "run"), *SHARED]
    records, log = tmp_path / "records", tmp_path / "log"
    with log.open("wb") as file:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen([*start, *program, *settings], cwd=REPOSITORY, env=environment, stdout=file, stderr=file)

    def hit(start: int, rank: int, number: signal.Signals) -> None:
        """A signal to a rank of one of torchrun's starts, once it has gone on by three steps."""

        def steps() -> int:
            return len({step for step, _ in read_records(records, f"start{start}-rank{rank}-*")})

        wait_until(lambda: steps() >= 3 or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        (path,) = records.glob(f"start{start}-rank{rank}-*.jsonl")
        os.kill(int(path.stem.rpartition("-")[2]), number)

    try:
        hit(0, 1, signal.SIGTERM)
        hit(1, 0, signal.SIGKILL)
        assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait()
    last = max(read_records(records, "start0-*"))[0]
    # What the second start begins with is what the first one ended with.
    assert min(read_records(records, "start1-*"))[0] == last + 1
    assert min(read_records(records, "start2-*"))[0] > last + 1
    assert read_records(records) == read_records(by_ranks[2] / "records")
    assert what_was_computed(tmp_path / "run") == what_was_computed(by_ranks[2] / "run")
