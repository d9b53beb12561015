"""Running programs of one checkout or another, in a process of their own: seconds, CPU time and memory, children included."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.memory import SAMPLE_SECONDS
from pbe_core.errors import InputError


@dataclass(frozen=True)
class Run:
    """What a program took."""

    seconds: float
    """By the clock."""
    cpu_seconds: float
    """User and system time of the process and of all that it started, as last seen by looks every 50 ms."""
    peak_mb: float | None
    """Largest sum of what they held (PSS), in 10^6 bytes; null where nobody looked."""


def run_in(checkout: Path, arguments: Sequence[str], log: Path, memory: bool = False) -> Run:
    """Run `python ARGUMENTS` with the packages of a checkout, from its folder, to its end.

    Args:
        checkout: a folder with `pipelines`, `pbe_core` and the others.
        arguments: of Python.
        log: where its output goes.
        memory: whether to look at memory, too, which costs the program some time.

    Raises:
        InputError: it failed; with its last lines.
    """
    # One thread for each library, so that CPU time is that of the work and not of threads that wait for each other.
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    spent: dict[tuple[int, float], float] = {}
    peak = 0.0
    began = time.perf_counter()
    with (
        log.open("wb") as output,
        subprocess.Popen([sys.executable, *arguments], cwd=checkout, env=environment, stdout=output, stderr=output) as process,
    ):
        root = psutil.Process(process.pid)
        while True:
            held = 0.0
            for one in _family(root):
                try:
                    times = one.cpu_times()
                    spent[one.pid, one.create_time()] = times.user + times.system
                    held += getattr(one.memory_full_info(), "pss", 0) / 1e6 if memory else 0
                except psutil.Error:  # It ended while we looked.
                    continue
            peak = max(peak, held)
            if _has_ended(process.pid):
                break
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise InputError(f"python {' '.join(arguments)[:200]} in {checkout} ended with {process.returncode}:\n{last_lines}")
    # Exact for the process itself and the children that it has waited for; looks miss what happens between two of them.
    own = usage.ru_utime + usage.ru_stime
    return Run(seconds, max(own, sum(spent.values())), peak if memory else None)


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _has_ended(process: int) -> bool:
    """Whether it has, and is still there to be asked what it took."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
