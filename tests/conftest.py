"""Fixtures shared by all tests. Shapes and types in signatures are checked while tests run."""

import atexit
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
# Several test processes share few cores: threads that spin while they wait would keep the others from what is waited for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray starts workers with niceness 15: beside programs of niceness 0 that use all cores they get next to nothing. The programs
# mend that for themselves; this is for clusters that tests start.
os.environ.setdefault("RAY_worker_niceness", "0")
# A Ray without an address joins the cluster that `ray start`, or a test, left word of in this folder: one for each test process.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray")
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

from jaxtyping import install_import_hook

# is_pep484_tower: an int is a float, as Python's typing says.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(["schemas", "pbe_core", "pipelines", "pbe_train"], CHECKER)

import hypothesis
import pytest
import torch
from filelock import FileLock

from pbe_core.dataset_reader import read_dataset
from pbe_core.settings import load_settings, preset
from pipelines.config import BuildSettings

torch.set_num_threads(2)
# How long an example takes tells what else the machine does, and nothing of the code.
hypothesis.settings.register_profile("any pace", deadline=None)
hypothesis.settings.load_profile("any pace")

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("PBE_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
VAE = str(REPOSITORY / "tiny_world" / "weights" / "vae")


STAND = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def pytest_collection_finish() -> None:
    """What imports have made stays: that Python looks through all of it for garbage again and again takes a fifth of the time."""
    gc.collect()
    gc.freeze()


@functools.cache
def standing_ray() -> str:
    """The address of a Ray that stands until this process ends: each build would take three seconds to start one of its own."""
    # Builds without an address must not find it.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray")}
    atexit.register(shutil.rmtree, environment["RAY_TMPDIR"], ignore_errors=True)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", STAND], env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    assert process.stdin
    assert process.stdout
    atexit.register(process.wait)
    atexit.register(process.stdin.close)  # What is registered last is done first.
    return process.stdout.readline().decode().strip()


def run_build(*options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python pipelines/build.py` with the tiny preset, as a user starts it on a cluster."""
    command = [sys.executable, "pipelines/build.py", "--config", "configs/tiny.yaml", "--ray.address", standing_ray(), *options]
    # Where this process has had a Ray of its own, that has left word that tokens are asked for.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    out = Path(command[command.index("--out") + 1]) if "--out" in command else None
    if done.returncode == 0 and out and (out / "dataset.json").is_file():
        books = read_dataset(out).books
        assert books.boxes == books.objects + sum(books.rejects.values())
        assert books.planned == books.samples + sum(books.failures.values())
    return done


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real photos with boxes, where the machine has them."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real sample data in {REAL_DATA} (set PBE_REAL_DATA)")
    return REAL_DATA


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
    """The dataset that the real command makes of it, on a real Ray with two actors."""
    out = shared_folder / "dataset"
    with made_once(out) as missing:
        if missing:
            run_build(*build_options(photos, out), "--ray.actors", "2")
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
