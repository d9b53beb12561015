"""Disks that are full or cannot be written to, and two builds in one folder. The disks are real: small tmpfs mounts."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbe_core.files import lock_folder
from tests.conftest import build_options, run_build
from tests.faults.kill_build import hashes_of


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 300 kB: less than the shards need, and more than the tables."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid():
        pytest.skip("only root may mount a small disk")
    try:
        mount(folder, "size=300k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let us mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_once_and_a_rerun_makes_the_same_bytes(disk, photos, dataset):
    out = disk / "out"
    options = [*build_options(photos, out), "--ray.attempts", "1"]
    done = run_build(*options, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("No space left on device") == 1
    assert "could not be packed; the others are kept, run again" in done.stderr
    assert not (out / "dataset.json").exists()
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    run_build(*options)
    assert hashes_of(out) == hashes_of(dataset)
    assert not list(out.rglob("*.tmp"))


def test_a_disk_too_small_for_the_tables_is_one_line(disk, photos):
    subprocess.run(["mount", "-o", "remount,size=8k", str(disk)], check=True)
    done = run_build(*build_options(photos, disk / "out"), check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "what was finished is kept: mend that, and the same command goes on from there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_cannot_be_written_to_is_one_line(disk, photos):
    out = disk / "out"
    out.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = run_build(*build_options(photos, out), check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: {out}: cannot be written to (Read-only file system); give another folder, or make this one writable\n"
    )


def test_of_two_builds_in_a_folder_the_second_is_refused_and_does_no_harm(photos, tmp_path):
    with lock_folder(tmp_path, "not this one"):
        before = list(tmp_path.iterdir())
        done = run_build(*build_options(photos, tmp_path), check=False)
        assert list(tmp_path.iterdir()) == before
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}: another build is at work in this folder; wait for it, or stop it\n"
