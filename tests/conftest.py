"""Fixtures shared by all tests. Shapes and types in signatures are checked while tests run."""

import atexit
import gc
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# Several test processes share few cores: threads that spin while they wait would keep the others from what is waited for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray starts workers with niceness 15: beside programs of niceness 0 that use all cores they get next to nothing. The programs
# mend that for themselves; this is for clusters that tests start.
os.environ.setdefault("RAY_worker_niceness", "0")
# A Ray without an address joins the cluster that `ray start`, or a test, left word of in this folder: one for each test process.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray")
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

from jaxtyping import config, install_import_hook

# is_pep484_tower: an int is a float, as Python's typing says.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["schemas", "pbe_core", "pipelines", "pbe_train"], CHECKER)

import hypothesis
import pytest
import torch
from filelock import FileLock

from pbe_core.errors import run_program
from pbe_core.progress import Progress
from pbe_core.settings import load_settings, preset
from pipelines.config import BuildSettings
from tests.browser import open_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

torch.set_num_threads(2)
# How long an example takes tells what else the machine does, and nothing of the code.
hypothesis.settings.register_profile("any pace", deadline=None)
hypothesis.settings.load_profile("any pace")

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("PBE_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
VAE = str(REPOSITORY / "tiny_world" / "weights" / "vae")


@dataclass(frozen=True)
class Done:
    """What a program left, as `subprocess` tells it."""

    returncode: int
    stdout: str
    stderr: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The wheel comes first: its two tests take longest of all files, and at the end the other process would wait for them."""
    items.sort(key=lambda item: item.path.name != "test_wheel.py")


def pytest_collection_finish() -> None:
    """What imports have made stays: that Python looks through all of it for garbage again and again takes a fifth of the time."""
    gc.collect()
    gc.freeze()


def call_program(main: Callable[[], int | None], *arguments: str) -> Done:
    """A program's `main` in this process, with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["a program", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        run_program(main)
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def run_build(*options: str, check: bool = True, pictures: bool = False) -> Done:
    """`pipelines/build.py` in this process, which packs the shards, too: a Ray and its actor would take ten seconds to start.

    Without the report and the contact sheet, unless they are asked for. The fixture `dataset` is made by the real command.
    """
    from pipelines import build

    threads = torch.get_num_threads()
    try:
        draw = build.draw_pictures if pictures else lambda settings, folder: None
        with patch("pipelines.dataset.pack.pack_on_ray", pack_here), patch.object(build, "draw_pictures", draw):
            done = call_program(build.main, "--config", str(preset("tiny")), *options)
    finally:
        torch.set_num_threads(threads)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def pack_here(settings: BuildSettings, fingerprint: str, numbers: list[int], progress: Progress) -> Iterator[tuple[int, str]]:
    """What `pack_on_ray` does, by one actor's class and without Ray."""
    from pipelines.dataset.pack import PackingActor

    actor = PackingActor(settings, fingerprint, "cpu")
    for number in numbers:
        yield number, actor.work(number)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Types are not checked on the way in, as for a user: a stand-in may take a model's place, and a wrong type arrives."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real photos with boxes, where the machine has them."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real sample data in {REAL_DATA} (set PBE_REAL_DATA)")
    return REAL_DATA


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A Chromium for the tests of one file, which open tabs in it (`tests.browser.open_tab`)."""
    with open_browser() as one:
        yield one


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder for what all processes of this run of the tests use and none changes."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def photos(shared_folder: Path) -> Path:
    """A small tiny world: 36 train and 16 validation photos as Open Images writes them."""
    from tiny_world.make_photos import make_world

    with made_once(shared_folder / "world") as missing:
        if missing:
            make_world(shared_folder / "world", 36, 16, 7, 1)
    return shared_folder / "world"


@pytest.fixture(scope="session")
def dataset(photos: Path, shared_folder: Path) -> Path:
    """The dataset that the real command makes of it, on a real Ray with two actors.

    It runs as `ray submit` starts it: build.py alone is copied to the cluster, and other folders are the current one.
    """
    out, elsewhere = shared_folder / "dataset", shared_folder / "submitted"
    with made_once(out) as missing:
        if missing:
            elsewhere.mkdir(exist_ok=True)
            script = shutil.copy(REPOSITORY / "pipelines" / "build.py", elsewhere)
            options = build_options(Path("..") / photos.name, Path("..") / out.name)
            command = [sys.executable, script, "--config", "configs/tiny.yaml", *options, "--ray.actors", "2"]
            done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return out


@contextmanager
def made_once(folder: Path) -> Iterator[bool]:
    """Whether a folder is still to be made, while the other test processes wait. What is left of a failure is removed."""
    with FileLock(folder.with_suffix(".lock")):
        missing = not folder.exists()
        try:
            yield missing
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def build_options(photos: Path, out: Path) -> list[str]:
    """Options of a small build."""
    folders = ["--source.annotations", str(photos), "--source.photos", str(photos), "--out", str(out)]
    # One actor, of a size that two of a test fit into one core: each takes seconds to start. A GPU stays out of it: its latents
    # would differ in the last bits.
    ray = ["--ray.actors", "1", "--ray.cpus_per_actor", "0.5", "--ray.gpus_per_actor", "0"]
    return [*folders, *ray, "--shards.samples", "20", "--latents.vae", VAE]


def settings_of(photos: Path, out: Path, *options: str) -> BuildSettings:
    """The settings of a small build."""
    return load_settings(BuildSettings, "build", [*build_options(photos, out), *options], preset("tiny"))
