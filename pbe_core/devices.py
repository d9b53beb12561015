"""What a device is called: measurements are kept by this name, and looked up by it."""

import platform
from pathlib import Path


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
