"""The pool of actors on a real Ray: lost processes, the memory monitor, progress from within a unit."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pbe_core.errors import InputError
from pbe_core.progress import Progress
from pipelines import ray_pool
from pipelines.ray_pool import actor_options, is_lost, what_was_lost, work_on_ray

FEWER = "run fewer of them"
# Ray's processes cannot import this file: what they need of it goes to them by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Marking:
    """A worker that notes each unit that it begins.

    On the doomed node it never ends, and when it is started again it is ended before it stands. The
    other one waits for that.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.finished = 0.0
        self.never = threading.Event()
        self.doomed = "DOOMED" in os.environ
        if self.doomed and (self.folder / "first").exists():
            (self.folder / "second").write_text(str(os.getpid()))
            self.never.wait()

    def ready(self) -> None: ...

    def work(self, unit: int) -> str:
        with (self.folder / "begun").open("a") as file:
            file.write(f"{unit}\n")
        if self.doomed:
            (self.folder / "first").touch()
            self.never.wait()
        if unit == 0:
            # Where it was ended before it began anything, there is nothing to wait for.
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and not self.other_is_gone():
                time.sleep(0.05)
        time.sleep(0.1)
        return ""

    def other_is_gone(self) -> bool:
        """Whether the process that was started again is ended."""
        try:
            os.kill(int((self.folder / "second").read_text()), 0)
        except ProcessLookupError:
            return True
        except (FileNotFoundError, ValueError):
            pass
        return False

    def done(self) -> float:
        return self.finished


class Waiting(Marking):
    """A worker that has done 30 of its unit, and goes on when it is told to."""

    def work(self, unit: int) -> str:
        self.finished = 30
        self.never.wait()
        return ""

    def go_on(self) -> None:
        self.never.set()


def begun(folder: Path) -> Counter[int]:
    return Counter(map(int, (folder / "begun").read_text().split()))


@contextlib.contextmanager
def two_nodes(**environment: str) -> Iterator[Callable[[], None]]:
    """A cluster of two nodes with a CPU each, the second one doomed, with this environment. Yields what takes that one away."""
    quiet = {"include_dashboard": False, "object_store_memory": 100_000_000}
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **quiet})
    node = cluster.add_node(num_cpus=1, object_store_memory=100_000_000, env_vars={"DOOMED": "1", **environment})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield lambda: cluster.remove_node(node)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_an_actor_that_the_memory_monitor_ends_takes_no_unit_with_it(tmp_path):
    """Once it has been started again as often as it may, its error is no RayActorError. Taken for idle, it would be given all
    units, and each would fail at once. The monitor of the doomed node ends every process, however little it uses.
    """
    make = ray.remote(Marking).options(**{**actor_options(1), "max_restarts": 1})
    progress = Progress("working", 12, "units")
    with two_nodes(RAY_memory_usage_threshold="0", RAY_memory_monitor_refresh_ms="500"):
        outcomes = dict(work_on_ray(lambda: make.remote(str(tmp_path)), 2, range(12), progress, FEWER))
    assert outcomes.keys() == set(range(12))
    times = begun(tmp_path)
    assert times.keys() == set(range(12)), "each was begun"
    for unit, error in outcomes.items():
        assert not error or times[unit] >= 2, "what failed was lost twice"
    assert [error for error in outcomes.values() if not error], "the other node works on"


class Hanging(Marking):
    """A worker that never ends its unit on the doomed node, and elsewhere does none before that one has begun."""

    def work(self, unit: int) -> str:
        if self.doomed:
            (self.folder / "first").touch()
            self.never.wait()
        while not (self.folder / "first").exists():
            time.sleep(0.05)
        return ""


def test_the_units_of_a_node_that_leaves_go_to_another_one(tmp_path):
    """While the other node is at work the lost actor finds no place: its unit must not wait for it, nor the end."""
    make = ray.remote(Hanging).options(**actor_options(1))
    with two_nodes() as take_away:
        work = work_on_ray(lambda: make.remote(str(tmp_path)), 2, range(6), Progress("working", 6, "units"), FEWER)
        outcomes = [next(work)]
        take_away()
        outcomes += work
    assert sorted(outcomes) == [(unit, "") for unit in range(6)]


@pytest.mark.long
def test_where_memory_is_short_everywhere_all_units_fail_with_that_word(tmp_path):
    """In bounded time, whatever is started again."""
    short = {"memory_usage_threshold": 0.0, "memory_monitor_refresh_ms": 500}
    ray.shutdown()
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _system_config=short
    )
    try:
        make = ray.remote(Waiting).options(**actor_options(1))
        outcomes = list(work_on_ray(lambda: make.remote(str(tmp_path)), 1, range(3), Progress("working"), FEWER))
    finally:
        ray.shutdown()
    assert sorted(unit for unit, _ in outcomes) == [0, 1, 2]
    assert "ran out of memory" in outcomes[-1][1]
    assert FEWER in outcomes[-1][1]
    assert "\n" not in outcomes[-1][1]


@pytest.fixture(scope="module", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def one_node() -> None:
    """One Ray for all tests that ask for it, unless one between them had another."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def test_what_is_done_of_a_unit_shows_while_it_goes_on(one_node, tmp_path):
    progress = Progress("packing", 100, "samples")
    made: list[Any] = []
    make = ray.remote(Waiting).options(**actor_options(1))

    def start() -> Any:
        made.append(make.remote(str(tmp_path)))
        return made[-1]

    assert progress.line().startswith("packing: 0 of 100 samples (0%)")
    seen: list[str] = []

    class Watched(Progress):
        def partly(self, at_hand: float) -> None:
            super().partly(at_hand)
            seen.append(self.line())
            if at_hand:
                made[0].go_on.remote()

    list(work_on_ray(start, 1, [7], Watched("packing", 100, "samples"), FEWER))
    assert any(line.startswith("packing: 30 of 100 samples (30%), ") and line.endswith(" left") for line in seen)


def test_a_late_answer_does_not_count_a_finished_unit_twice(one_node):
    """An actor answers how far it is when it can: by then its unit may be done, and counted as a whole."""
    progress = Progress("packing", total=40, unit="samples")
    actor = ray_pool._Actor(None, units={0})
    pool = ray_pool._Pool(deque(), progress, FEWER, 1, bool, [actor])
    pool.asked[ray.put(20.0)] = actor
    pool.forget(actor, 0)
    pool.look()
    actor.units.add(1)
    assert actor.done == progress.at_hand == 0


def test_waiting_for_ray_is_told_and_taken_back(one_node, tmp_path):
    said: list[str] = []

    class Watched(Progress):
        def say(self, status: str) -> None:
            super().say(status)
            said.append(status)

    make = ray.remote(Marking).options(**actor_options(1))
    list(work_on_ray(lambda: make.remote(str(tmp_path)), 2, [1, 2, 3], Watched("packing", 3, "shards"), FEWER))
    assert "waiting for Ray" in said[0]
    assert said[-1] == ""


class Broken(Marking):
    """A worker that cannot start, as where its node lacks the VAE."""

    def __init__(self, folder: str) -> None:
        raise InputError(f"{folder}: not on this node")


def test_an_actor_that_cannot_start_fails_its_units_and_ends(one_node, tmp_path):
    """Every unit is named once with the cause, and nothing waits for ever."""
    make = ray.remote(Broken).options(**actor_options(1))
    outcomes = list(work_on_ray(lambda: make.remote(str(tmp_path)), 1, [0, 1, 2], Progress("working"), FEWER))
    assert [unit for unit, _ in outcomes] == [0, 1, 2]
    assert all("not on this node" in error for _, error in outcomes)


@pytest.mark.parametrize(
    ("error", "of_memory"),
    [
        (ray.exceptions.OutOfMemoryError("node 7\nand more"), True),
        (ray.exceptions.ActorUnavailableError("it is restarting", None), True),
        (ray.exceptions.NodeDiedError("node 7\nand more"), False),
        (ray.exceptions.WorkerCrashedError(), False),
        (ray.exceptions.LocalRayletDiedError(), False),
        (ray.exceptions.ActorDiedError(), False),
    ],
)
def test_all_errors_of_ray_itself_mean_that_a_process_is_gone(error, of_memory):
    assert is_lost(error)
    said = what_was_lost(error, FEWER)
    assert ("memory" in said) == (FEWER in said) == of_memory


class Several:
    """An async worker with several units at hand, which it notes. Unit 3 ends its process, each time; those from 7 on last."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.at_hand: set[int] = set()
        self.stopping = asyncio.Event()

    async def ready(self) -> None: ...

    async def work(self, unit: int) -> str:
        self.at_hand.add(unit)
        with (self.folder / "at_hand").open("a") as file:
            file.write(" ".join(map(str, sorted(self.at_hand))) + "\n")
        if unit == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if unit >= 7:
            await self.stopping.wait()
        await asyncio.sleep(0.05)
        self.at_hand.discard(unit)
        return ""

    async def done(self) -> float:
        return 0

    async def stop(self) -> None:
        self.stopping.set()


def seen_at_hand(folder: Path) -> list[set[int]]:
    path = folder / "at_hand"
    return [set(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_unit_that_ends_its_actor_takes_no_other_unit_with_it(one_node, tmp_path):
    """Of several at hand nobody knows which it was: each is given out again, alone."""
    make = ray.remote(Several).options(**actor_options(1, at_once=8))
    outcomes = dict(work_on_ray(lambda: make.remote(str(tmp_path)), 1, range(6), Progress("working"), FEWER, at_once=8))
    assert {unit for unit, error in outcomes.items() if error} == {3}
    assert outcomes.keys() == set(range(6))
    at_hand = seen_at_hand(tmp_path)
    assert max(map(len, at_hand)) > 1
    assert sum(3 in units for units in at_hand) >= 3
    assert {3} in at_hand


def test_an_actor_without_progress_gets_further_units_and_a_stop_ends_what_lasts(one_node, tmp_path):
    make = ray.remote(Several).options(**actor_options(1, at_once=8))
    outcomes = work_on_ray(
        lambda: make.remote(str(tmp_path)),
        1,
        range(7, 17),
        Progress("working"),
        FEWER,
        at_once=8,
        stops=lambda: max(map(len, seen_at_hand(tmp_path)), default=0) == 8,
    )
    assert dict(outcomes) == dict.fromkeys(range(7, 15), "")
