"""On what a measurement was made: enough to compare by, nothing that tells whose machine it was."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pbe_core.machine import cpu_name

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Processor, CPUs that this process may use, memory in GB, and how busy it was already (load of the last minute)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu_name(), "cpus": cpus, "memory_gb": round(memory / 1e9, 1), "load_before": round(os.getloadavg()[0], 2)}


def describe_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the named packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def today() -> str:
    """The date in UTC, as YYYY-MM-DD."""
    return datetime.now(UTC).date().isoformat()
