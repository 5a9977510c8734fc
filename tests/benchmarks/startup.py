"""What `import vqprior` adds to `import torch`, in fresh processes."""

import functools
import subprocess
import sys
import time

import numpy as np

from tests.benchmarks.machine import ROOT
from tests.benchmarks.timing import Measured, Settings, summarize, wanted

# Seconds until torch is there, and until everything is.
CODE = """
from time import perf_counter
start = perf_counter()
import torch
torch_there = perf_counter()
{more}
print(torch_there - start, perf_counter() - start)
"""


def alternated(settings: Settings) -> Measured:
    """With and without, in turn: the difference of the two."""
    rounds = _rounds(settings)
    return summarize(1000 * (rounds[:, 0, 1] - rounds[:, 1, 1]), "ms", rounds[:, :, 1])


def within(settings: Settings) -> Measured:
    """From the moment that torch is there, inside one process."""
    rounds = _rounds(settings)
    return summarize(1000 * (rounds[:, 0, 1] - rounds[:, 0, 0]), "ms")


@functools.cache  # the two rows are of the same rounds
def _rounds(settings: Settings) -> np.ndarray:
    """Seconds ``(rounds, with and without, torch and everything)``."""
    _start("import vqprior")  # compiles what was not yet, and fills the cache of the disk
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
