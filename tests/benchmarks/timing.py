"""Two sides in alternation, and what there is to say about the rounds."""

import dataclasses
import gc
import time
from collections.abc import Callable

import numpy as np
import torch

FEWEST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure: where, with how many threads, and how long at most for one row."""

    device: str = "cpu"
    threads: int = 1
    repeats: int = 30
    seconds: float = 15.0
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row: a median with quartiles, and the medians of the seconds of both sides.

    ``value`` is None where nothing was measured; ``note`` says why. ``points`` are those of a
    curve.
    """

    unit: str
    value: float | None
    low: float | None = None
    high: float | None = None
    seconds: list[float] | None = None
    rounds: int | None = None
    note: str = ""
    points: list[dict[str, float | None]] | None = None


def alternate(
    ours: Callable[[], object], other: Callable[[], object], settings: Settings
) -> np.ndarray:
    """Seconds of both, called in turn: ``(rounds, 2)``. Both have to be warm.

    A machine that becomes slower or faster meanwhile does so for both. Rounds end with the time
    of a row, but not before the fewest that have quartiles.
    """
    gc.collect()
    gc.freeze()  # what is there already need not be looked through before each call
    started, rounds = time.perf_counter(), []
    while wanted(rounds, started, settings):
        rounds.append((seconds_of(ours, settings.device), seconds_of(other, settings.device)))
    gc.unfreeze()
    return np.array(rounds)


def wanted(rounds: list, started: float, settings: Settings) -> bool:
    """Whether there is to be another round."""
    in_time = time.perf_counter() - started < settings.seconds
    return len(rounds) < settings.repeats and (in_time or len(rounds) < FEWEST_ROUNDS)


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; what it returns is let go before the next begins."""
    gc.collect()  # never in the middle of a call, at the expense of one side
    gc.disable()
    try:
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def summarize(
    values: np.ndarray, unit: str, seconds: np.ndarray | None = None, note: str = ""
) -> Measured:
    """Median and quartiles of one value for each round."""
    low, median, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    medians = None if seconds is None else [float(m) for m in np.median(seconds, axis=0)]
    return Measured(unit, median, low, high, medians, len(values), note)
