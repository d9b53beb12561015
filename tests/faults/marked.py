"""Processes that a test may end with SIGKILL: those that it started, and all that these started, known by a mark."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil

from pbe_core.settings import REPOSITORY

_MARK = "PBE_FAULTS"


class MarkedProcesses:
    """Runs one command over and over, with a Ray of its own. Touches no process but those that it started. A context manager."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """Nothing is started yet; what the command says is appended to `log`. `environment` is set for all of its processes."""
        self.environment = environment
        self.command = list(command)
        self.log = log
        self.mark = uuid.uuid4().hex
        # Its folder is short, since sockets lie in it.
        self.ray_folder = Path(tempfile.mkdtemp(prefix="ray"))

    def __enter__(self) -> "MarkedProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        self.end_all()
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command."""
        environment = {**os.environ, **self.environment, _MARK: self.mark, "RAY_TMPDIR": str(self.ray_folder)}
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True)

    def alive(self, name: str = "") -> list[psutil.Process]:
        """All processes of all runs that are still there, or those whose program is called so."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == self.mark
                if ours and name in process.cmdline()[0]:
                    found.append(process)
        return found

    def end_all(self) -> None:
        """SIGKILL to whatever is left of ours, until nothing is."""
        while left := self.alive():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
