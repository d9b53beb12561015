"""What depends on the machine: what its devices are called, its memory, and folders with names that are short enough for sockets.

The path of a Unix socket has 107 bytes at most. Batch systems set TMPDIR to longer names, and then Ray does not start, and
PyTorch's loader processes hand nothing over, for ever.
"""

import atexit
import ctypes
import multiprocessing
import os
import platform
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

LONGEST_PATH_BYTES = 107
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
# What multiprocessing puts behind the folder for temporary files.
_OF_MULTIPROCESSING = "pymp-12345678/listener-12345678"


def fits(folder: Path, socket: str) -> bool:
    """Whether a socket's path is short enough in a folder."""
    return len(os.fsencode(folder / socket)) <= LONGEST_PATH_BYTES


def short_folder() -> Path | None:
    """A new private folder with a short name; null where none can be made. Who calls this removes it."""
    for folder in _SHORT_FOLDERS:
        try:
            return Path(tempfile.mkdtemp(prefix="pbe-", dir=folder))
        except OSError:
            continue
    return None


def make_room_for_multiprocessing() -> None:
    """Let the sockets of this process and of those that it will start lie elsewhere, if TMPDIR is too long for them."""
    chosen = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" in chosen or fits(Path(tempfile.gettempdir()), _OF_MULTIPROCESSING):
        return
    folder = short_folder()
    if folder:
        chosen["tempdir"] = str(folder)  # Children inherit it.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def give_memory_back() -> None:
    """Give the system what the C library keeps of freed memory.

    glibc keeps some hundred MB of what a pass through a large network freed, in pieces that are too small for the next network's
    features: these came on top, and made the peak.
    """
    with suppress(AttributeError, TypeError, OSError):  # musl, macOS and Windows have no such function.
        ctypes.CDLL(None).malloc_trim(0)


def device_name() -> str:
    """The GPU that PyTorch would use, else the processor."""
    import torch  # It takes seconds to load, and many who import this never ask.

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
