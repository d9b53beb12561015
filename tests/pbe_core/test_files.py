"""What writers that were killed leave is swept away, and nothing of those that live. Writers are real processes."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbe_core.files import atomic_file, sweep, temporary_folder, write_atomically
from pbe_core.settings import REPOSITORY

WRITER = """
import os, sys
from pathlib import Path
from pbe_core.files import atomic_file, temporary_folder
folder = Path(sys.argv[1])
with {what} as temporary:
    {do}
    print("writing", flush=True)
    sys.stdin.read()
"""
FILE = {"what": 'atomic_file(folder / "table")', "do": 'temporary.write_bytes(b"a part")'}
FOLDER = {"what": 'temporary_folder(folder, "table")', "do": '(temporary / "run").write_bytes(b"a part")'}
# Its child has all that the writer had open, and outlives it.
FORKING = {
    **FILE,
    "do": """stands, told = os.pipe()
    if not os.fork():
        os.write(told, b"!")
        sys.stdin.read()
        os._exit(0)
    os.read(stands, 1)""",
}


@contextmanager
def writing(folder: Path, how: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing; it goes on when its input ends."""
    command = [sys.executable, "-c", WRITER.format(**how), str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", [FILE, FOLDER, FORKING], ids=["file", "folder", "forking"])
def test_what_a_killed_writer_leaves_is_swept_and_not_what_a_living_one_writes(how, tmp_path):
    with writing(tmp_path, how) as process:
        assert len(left(tmp_path)) == 1
        sweep(tmp_path)
        assert len(left(tmp_path)) == 1
        kill(process)
        sweep(tmp_path, "another")
        assert len(left(tmp_path)) == 1
        sweep(tmp_path)
        assert left(tmp_path) == []


def test_the_next_one_to_write_a_file_takes_away_what_killed_ones_left(tmp_path):
    with writing(tmp_path, FILE) as killed:
        kill(killed)
    with writing(tmp_path, FILE) as living:
        write_atomically(tmp_path / "table", b"whole")
        names = left(tmp_path)
        assert (len(names), names[-1]) == (2, "table")
        kill(living)
    write_atomically(tmp_path / "table", b"whole")
    assert left(tmp_path) == ["table"]


def test_a_process_does_not_sweep_what_it_writes_itself(tmp_path):
    with atomic_file(tmp_path / "table") as temporary, temporary_folder(tmp_path, "runs") as folder:
        temporary.write_bytes(b"whole")
        sweep(tmp_path)
        assert temporary.exists()
        assert folder.exists()
    assert left(tmp_path) == ["table"]


def test_where_there_are_no_locks_only_what_is_old_is_swept(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    young, old = (tmp_path / f".table.{digit * 32}.tmp" for digit in "12")
    for path in (young, old):
        path.touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    write_atomically(tmp_path / "table", b"whole")
    assert left(tmp_path) == [young.name, "table"]


def test_files_of_others_stay(tmp_path):
    others = [".hidden", "table.tmp", ".git", ".table", ".another's.tmp", ".another's.1.tmp"]
    for name in others:
        (tmp_path / name).touch()
    sweep(tmp_path)
    sweep(tmp_path / "nowhere")
    assert left(tmp_path) == sorted(others)
