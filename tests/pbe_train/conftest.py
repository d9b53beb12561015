"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest
import torch

from tests.pbe_train.small_world import World, make_world


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    """The networks here are so small that a second thread costs more than it gives, above all beside other work.

    Runs in this process are compared bit for bit with programs that have one. Set for each module: whichever other tests are
    collected, and in which order, must not matter.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)  # A session's fixtures are made before those of its modules.
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def run_folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, which no test changes."""
    from pbe_train.train import train
    from pbe_train.training.distributed import Distributed

    out = tmp_path_factory.mktemp("run")
    train(world.settings(out, "--steps=2"), Distributed(0, 1, torch.device("cpu")))
    return out
