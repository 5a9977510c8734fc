"""Describes the machine and the versions of the software."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from tests.benchmarks import peer
from tests.benchmarks.timing import Settings

ROOT = Path(__file__).parents[2]
MEASURED = ("vqprior", "tests/benchmarks")  # paths whose changes are marked in the commit


def describe(settings: Settings) -> dict[str, str | int | float | None]:
    """Returns the hardware, settings and versions that times depend on."""
    memory = _meminfo("MemTotal")
    cuda = settings.device == "cuda"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "memory_gib": None if memory is None else round(memory / (1 << 30), 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        peer.PEER: peer.version(),
    }


def commit(*measured: str) -> str | None:
    """Returns the commit, marked if ``measured`` has changes; None outside a repository."""
    # Without the lock, so that other git commands do not have to wait.
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git("--no-optional-locks", "status", "--porcelain", "--", *(measured or MEASURED))
    return f"{head} with changes" if changed else head


def free_bytes(device: str) -> int | None:
    """Returns the free memory of the device in bytes; None if unknown."""
    if device == "cuda":
        torch.cuda.empty_cache()  # memory cached by this process is free
        return torch.cuda.mem_get_info()[0]
    return _meminfo("MemAvailable")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None
    )
