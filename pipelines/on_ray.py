"""Joining a Ray cluster, or starting a Ray of our own on this machine."""

import atexit
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ray

from pbe_core.errors import InputError, Terminated, heed_sigterm
from pbe_core.machine import fits, short_folder
from pbe_core.progress import print_line

# A cluster that is there answers in milliseconds. Ray itself would ask for minutes, and print what only its authors understand.
_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 60
_OWN = "to start a Ray of its own, for this machine alone, give --ray.address local"
_NOTED = "`ray start` has noted it on this machine; `ray stop` forgets it"
# Ray's own client, in a process that can be ended: it has no limit of time that holds for all that may answer at a port.
_ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
# What Ray puts behind its folder, with a pid of seven digits.
_SOCKET = "ray/session_2026-11-30_00-00-00_000000_1234567/sockets/plasma_store.10"


def start_ray(address: str | None) -> None:
    """Join the cluster at an address; without one, that of RAY_ADDRESS, or the one this machine was made a part of with
    `ray start`; where there is none, start a Ray for the time of this process.

    Does nothing where this process has one; where that has lost all its nodes (that of this machine was killed), it begins anew.
    Says on stderr which cluster it joins, since what runs there belongs to others, too. From then on SIGTERM is as Ctrl-C, where
    the program has no handler of its own; one that comes while Ray starts waits until it has, and the second one does not.

    Raises:
        InputError: there is no cluster at the address, it cannot be joined, or Ray has no folder for its sockets.
    """
    with _sigterm_later():
        _join_or_start(address)


@contextmanager
def _sigterm_later() -> Iterator[None]:
    """Note a SIGTERM, and deliver it at the end, to the handler of before, or as Ctrl-C where there was none.

    While Ray starts it has a handler of its own, which raises `SystemExit`. It forks processes meanwhile, and what a handler
    raises in one of the calls that Python makes after a fork is lost: a crawl has gone on that was told to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, came = signal.getsignal(signal.SIGTERM), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise Terminated
        came = True

    signal.signal(signal.SIGTERM, note)
    sets_its_own = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = sets_its_own
        # Set in any case: what Ray is made of has put an abort in its place, of which Python knows nothing.
        if before in (signal.SIG_DFL, None):
            heed_sigterm()
        else:
            signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)


def _join_or_start(address: str | None) -> None:
    if ray.is_initialized():
        if any(node["Alive"] for node in ray.nodes()):
            return
        print_line("Ray's processes on this machine were ended; starting it again")
        ray.shutdown()
    cluster = find_cluster(address)
    # A Ray of our own needs no dashboard, which would cost a gigabyte of memory where it is installed.
    plain = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if cluster is None:
        # Ray would start its workers with niceness 15, which gets them next to nothing of cores that other programs use.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address="local", _temp_dir=folder_for_sockets(), **plain)
        return
    where, told_by = cluster
    check_answers(where, told_by)
    try:
        # As given: where Ray itself finds the address, in a file of `ray start`, it also looks for the cluster's token.
        ray.init(address=address, **plain)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(f"the Ray cluster at {where} ({told_by}) cannot be joined: {cause_of(error)}; {_OWN}") from None
    print_line(f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}")


def find_cluster(address: str | None) -> tuple[str, str] | None:
    """The cluster to join as `host:port`, and who names it; null where a Ray of our own is to be started. Asks nobody.

    Raises:
        InputError: what is named is no address of a cluster.
    """
    own = address in (None, "", "auto")
    given = os.environ.get("RAY_ADDRESS") if own else address
    told_by = "RAY_ADDRESS" if own else "build.ray.address"
    scheme, mark, _ = (given or "").partition("://")
    if mark:
        submit = f"`ray job submit --address {given} -- python ...`" if scheme in ("http", "https") else "`ray job submit`"
        raise InputError(
            f"{told_by} is {given}, where jobs are submitted, and no cluster that a program can join: submit it there ({submit}, "
            f"docs/clusters.md), or give the cluster's own address (HOST:6379); {_OWN}"
        )
    try:
        found: str | None = ray._private.services.canonicalize_bootstrap_address(given or address or None)
        if found and not found.rpartition(":")[2].isdigit():
            raise ValueError("its port is no number")
    except ConnectionError:  # For `auto`.
        raise InputError(
            f"build.ray.address is auto, and no Ray runs on this machine; start one (`ray start --head`); {_OWN}"
        ) from None
    except (ValueError, OSError) as error:
        raise InputError(
            f"{told_by} is {given}: no address of a Ray cluster ({cause_of(error)}); give HOST:6379; {_OWN}"
        ) from None
    if found is None:
        return None
    return found, told_by if given else _NOTED


def check_answers(where: str, told_by: str) -> None:
    """Make sure that a Ray cluster answers at `host:port`, in bounded time.

    Raises:
        InputError: nobody does, or somebody else; names `told_by`, who gave the address.
    """
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        asked = subprocess.run([sys.executable, "-c", _ASK, where], capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        problem = f"something is there, and is no Ray cluster, or does not answer within {_ANSWER_SECONDS} s"
    except (OSError, ValueError) as error:
        problem = cause_of(error)
    else:
        said = (asked.stderr.strip().splitlines() or [""])[-1].removeprefix("ray.exceptions.")
        if not asked.returncode or said.startswith(("ImportError", "ModuleNotFoundError", "AttributeError", "TypeError")):
            return  # Of a Ray that has no such client, joining it tells.
        if said.startswith("AuthenticationError") and told_by == _NOTED:
            return  # Ray looks for the token itself.
        if said.startswith("AuthenticationError"):
            raise InputError(
                f"the Ray cluster at {where} ({told_by}) asks for a token: set RAY_AUTH_MODE=token, and have its token in "
                f"~/.ray/auth_token or RAY_AUTH_TOKEN (docs/clusters.md); {_OWN}"
            )
        problem = said[:200] or "it is no Ray cluster"
    raise InputError(
        f"no Ray cluster answers at {where} ({told_by}): {problem}; start it, give the address of another one "
        f"(--ray.address HOST:6379); {_OWN}"
    )


def folder_for_sockets() -> str | None:
    """A folder of our own for Ray's files, where its usual one has too long a name or cannot be written to; else null.

    The usual one lies in RAY_TMPDIR, TMPDIR or /tmp; batch systems set TMPDIR to names that are too long for sockets. Ours is
    private, and is removed when this process ends.

    Raises:
        InputError: there is no place for one.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp").absolute()
    problem = None if fits(usual, _SOCKET) else "too long a name for Ray's sockets"
    there = next(folder for folder in (usual / "ray", usual, *usual.parents) if folder.exists())
    if not problem and not os.access(there, os.W_OK | os.X_OK):
        problem = "no folder that can be written to"
    if not problem:
        return None
    own = short_folder()
    if not own:
        raise InputError(f"{usual}: {problem}; set RAY_TMPDIR to a folder of a short name that can be written to")
    atexit.register(_remove, own)
    print_line(f"{usual} is {problem}: they lie in {own} until this ends")
    return str(own)


def _remove(folder: Path) -> None:
    ray.shutdown()  # Ray's own end comes later: this was registered after it.
    shutil.rmtree(folder, ignore_errors=True)


def cause_of(error: BaseException) -> str:
    """The first line of an error, or of the one that it came from."""
    said = str(error.__cause__ or error).strip() or type(error).__name__
    return said.splitlines()[0][:300]
