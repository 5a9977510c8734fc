"""Times two sides in alternation, and summarizes the rounds."""

import dataclasses
import gc
import time
from collections.abc import Callable

import numpy as np
import torch

FEWEST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Device, threads, and limits of rounds and seconds per row."""

    device: str = "cpu"
    threads: int = 1
    repeats: int = 30
    seconds: float = 15.0
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Measured:
    """One row: a median with quartiles, and the median seconds of both sides.

    ``value`` is None if nothing was measured; ``note`` says why. ``points`` are those of a curve.
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
    """Returns the seconds of both sides, called in turn: ``(rounds, 2)``. Both must be warm.

    Changes of the machine's speed affect both sides. Rounds end with the time of a row, but not
    before ``FEWEST_ROUNDS``.
    """
    gc.collect()
    gc.freeze()  # existing objects need not be scanned before each call
    started, rounds = time.perf_counter(), []
    while wanted(rounds, started, settings):
        rounds.append((seconds_of(ours, settings.device), seconds_of(other, settings.device)))
    gc.unfreeze()
    return np.array(rounds)


def wanted(rounds: list, started: float, settings: Settings) -> bool:
    """Returns whether to run another round."""
    in_time = time.perf_counter() - started < settings.seconds
    return len(rounds) < settings.repeats and (in_time or len(rounds) < FEWEST_ROUNDS)


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Returns the seconds of one call; its result is freed before the next call."""
    gc.collect()  # so that no collection happens during a call
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
    """Waits until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def summarize(
    values: np.ndarray, unit: str, seconds: np.ndarray | None = None, note: str = ""
) -> Measured:
    """Returns the median and quartiles of one value per round."""
    low, median, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    medians = None if seconds is None else [float(m) for m in np.median(seconds, axis=0)]
    return Measured(unit, median, low, high, medians, len(values), note)
