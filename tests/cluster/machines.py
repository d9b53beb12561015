"""Machines made of this one: each a PID namespace, whose processes see one another only, and can all be ended at once.

    this process ──▶ unshare ──▶ command (process 1 of the machine) ──▶ Ray, its workers, ...

The end of `unshare`, by whatever way, is that of all of them, as by a power cut; and this process cannot end without it.
`ray stop`, which ends every Ray process that it sees, does in here what it does on a machine of its own.
"""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from pbe_core.errors import InputError
from pbe_core.settings import REPOSITORY

PROGRAMS = {"setpriv": "util-linux", "unshare": "util-linux"}


class Machine:
    """A command in a PID namespace of its own; a context manager that ends it and all that it has started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it in the project's root, with what it prints going to `log`."""
        self.log = log
        # Without being root, namespaces can be made where the system gives users namespaces of their own.
        rights = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
        alone = ["unshare", *rights, "--pid", "--fork", "--mount-proc", "--kill-child=KILL", *command]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *alone],
                cwd=REPOSITORY,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # A Ctrl-C is for this process, which ends the machine then.
                start_new_session=True,
            )

    def __enter__(self) -> "Machine":
        """The machine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all of its processes; returns when none is left."""
        processes = self.processes()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(processes)

    def processes(self) -> list[psutil.Process]:
        """What runs on it, as this process sees it."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def runs(self, name: str) -> bool:
        """Whether one of its processes has this in its command line."""
        for process in self.processes():
            try:
                if name in " ".join(process.cmdline()):
                    return True
            except psutil.Error:
                continue
        return False

    def has_ended(self) -> bool:
        """Whether its command has come to its end.

        Raises:
            RuntimeError: it failed; with the last lines of its log.
        """
        status = self.process.poll()
        if status:
            lines = self.log.read_text(errors="replace").splitlines()[-40:]
            raise RuntimeError("\n".join([f"{self.log}: the command failed with status {status}, saying", *lines]))
        return status is not None


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def check_programs(programs: Mapping[str, str], path: str = os.defpath) -> None:
    """Refuse a machine that lacks programs; `programs` says in which Debian package each is.

    Raises:
        InputError: names them, and how to install them.
    """
    missing = {name: package for name, package in programs.items() if not shutil.which(name, path=f"{os.environ['PATH']}:{path}")}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise InputError(f"{', '.join(missing)}: not installed; on Debian and Ubuntu: apt-get install {packages}")
