"""The machine, and the versions of what ran on it."""

import os
import platform
import subprocess
from pathlib import Path

import torch

from tests.benchmarks import peer
from tests.benchmarks.timing import Settings

ROOT = Path(__file__).parents[2]
MEASURED = ("vqprior", "tests/benchmarks")  # what a commit has to hold to name the measurement


def describe(settings: Settings) -> dict[str, str | int | float | None]:
    """What a time depends on beside the code."""
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
    """The commit, marked if what was measured differs from it; None outside of a repository."""
    # Without the lock, so that nobody who works there has to wait.
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git("--no-optional-locks", "status", "--porcelain", "--", *(measured or MEASURED))
    return f"{head} with changes" if changed else head


def free_bytes(device: str) -> int | None:
    """Memory that is free on the device; None where nobody tells."""
    if device == "cuda":
        torch.cuda.empty_cache()  # what this process keeps for itself is free, too
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
