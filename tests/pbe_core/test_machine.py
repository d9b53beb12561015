"""Names that are too long for sockets, as batch systems give TMPDIR; memory that the C library keeps."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pbe_core.machine import give_memory_back
from pbe_core.settings import REPOSITORY

LOADED = """
import multiprocessing, sys, torch
from torch.utils.data import DataLoader
from pbe_core.machine import make_room_for_multiprocessing

class Squares(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, number): return torch.full((1000,), number ** 2)

if __name__ == "__main__":
    make_room_for_multiprocessing()
    # Without room nothing ever comes.
    loader = DataLoader(Squares(), num_workers=1, timeout=int(sys.argv[1]), multiprocessing_context="fork")
    print([int(batch[0, 0]) for batch in loader])
    print(multiprocessing.current_process()._config["tempdir"])
"""


def test_loader_processes_hand_over_tensors_with_a_long_tmpdir(tmp_path):
    long = tmp_path / ("scratch_of_a_batch_system_" * 3) / "jobs"
    long.mkdir(parents=True)
    command = [sys.executable, "-c", LOADED, "900"]
    environment = {**os.environ, "TMPDIR": str(long)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    handed_over, folder = done.stdout.splitlines()
    assert handed_over == "[0, 1, 4, 9]"
    assert not Path(folder).exists(), "it is removed at the end"
    assert not list(long.iterdir())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_what_was_freed_goes_back():
    """Pieces that are too small to be asked of the system one by one: 200 MB, with one that stays above them."""
    process = psutil.Process()
    pieces = [bytearray(100_000) for _ in range(2_000)]
    above = bytearray(100_000)
    before = process.memory_info().rss
    del pieces
    give_memory_back()
    assert process.memory_info().rss < before - 150_000_000
    del above
    give_memory_back()
