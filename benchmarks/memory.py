"""How much memory a program takes: watched from outside, and as the kernel counts it."""

import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from pbe_core.errors import InputError

SAMPLE_SECONDS = 0.05


def run_watched(command: Sequence[str], log: Path, name: str) -> "MemorySampler":
    """Run a program to its end and watch its memory; what it prints goes to `log`.

    Raises:
        InputError: it failed; says `name` and its last lines.
    """
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        sampler = MemorySampler(process.pid)
        sampler.start()
        process.wait()
        sampler.finish()
    if process.returncode:
        last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise InputError(f"{name} ended with status {process.returncode}:\n{last_lines}")
    return sampler


def high_water_mb() -> float | None:
    """Largest resident memory of this process so far, in MB; null where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


class MemorySampler(threading.Thread):
    """Looks at a process and all its children every 50 ms, until it is gone; keeps the largest sum in MB."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(process)
        self.finished = threading.Event()
        self.peak_mb = 0.0
        self.samples = 0

    def run(self) -> None:
        """Sample until `finish` is called."""
        while not self.finished.wait(SAMPLE_SECONDS):
            self.peak_mb = max(self.peak_mb, self.memory_mb())
            self.samples += 1

    def memory_mb(self) -> float:
        """What is held now, in MB."""
        held = 0
        try:
            for process in [self.process, *self.process.children(recursive=True)]:
                memory = process.memory_full_info()
                held += getattr(memory, "pss", memory.uss)  # USS where the system has no PSS.
        except psutil.Error:  # One of them ended while we looked.
            return 0.0
        return held / 1e6

    def finish(self) -> None:
        """Stop and wait."""
        self.finished.set()
        self.join()
