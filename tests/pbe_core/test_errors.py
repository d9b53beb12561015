"""How a program ends that is interrupted before it has begun, or told to end more than once."""

import fcntl
import signal
import subprocess
import sys
import time

import pytest

from pbe_core.errors import INTERRUPTED, Terminated, heed_sigterm
from pbe_core.settings import REPOSITORY


@pytest.mark.parametrize(("program", "module"), [(["pbe_train/train.py"], "torch."), (["-m", "pipelines.build"], "pyarrow.")])
def test_ctrl_c_while_a_program_loads_is_one_line(program: list[str], module: str):
    """Python prints each module that it has imported; the pipe is so small that it cannot come far beyond what was read here."""
    command = [sys.executable, "-X", "importtime", *program, "--config", "none"]
    ignored = signal.SIGINT  # Of jobs in the background shells switch it off, and Python then leaves it so.
    with subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(ignored, signal.SIG_DFL)
    ) as process:
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        for line in process.stderr:
            if line.rpartition("|")[2].strip().startswith(module):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    # What Python was printing may have been cut off.
    assert rest.endswith(f"{INTERRUPTED}\n")
    assert "Traceback" not in rest
    assert process.returncode == 130


def test_a_stop_that_arrives_twice_does_not_disturb_the_way_out(monkeypatch):
    """Ray's end, files that are closed: a second SIGTERM in it would be a page of traceback. One that comes later counts."""
    before, now = signal.getsignal(signal.SIGTERM), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    try:
        heed_sigterm()
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        now[0] += 1
        signal.raise_signal(signal.SIGTERM)
        now[0] += 10
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
