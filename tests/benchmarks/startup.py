"""Measures the time that `import vqprior` adds to `import torch`, in fresh processes."""

import functools
import subprocess
import sys
import time

import numpy as np

from tests.benchmarks.machine import ROOT
from tests.benchmarks.timing import Measured, Settings, summarize, wanted

# Prints the seconds until torch is imported, and until everything is.
CODE = """
from time import perf_counter
start = perf_counter()
import torch
torch_there = perf_counter()
{more}
print(torch_there - start, perf_counter() - start)
"""


def alternated(settings: Settings) -> Measured:
    """Measures the difference between processes with and without the import, run in turn."""
    rounds = _rounds(settings)
    return summarize(1000 * (rounds[:, 0, 1] - rounds[:, 1, 1]), "ms", rounds[:, :, 1])


def within(settings: Settings) -> Measured:
    """Measures the import in one process after torch is imported."""
    rounds = _rounds(settings)
    return summarize(1000 * (rounds[:, 0, 1] - rounds[:, 0, 0]), "ms")


@functools.cache  # both rows use the same rounds
def _rounds(settings: Settings) -> np.ndarray:
    """Returns seconds ``(rounds, with and without, torch and everything)``."""
    _start("import vqprior")  # compiles bytecode and fills the disk cache
    started, rounds = time.perf_counter(), []
    while wanted(rounds, started, settings):
        rounds.append([_start("import vqprior"), _start("")])
    return np.array(rounds)


def _start(more: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(more=more)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [float(seconds) for seconds in done.stdout.split()]
