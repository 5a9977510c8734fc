"""Measures the time per token as one size grows 64 times and the others are fixed."""

import dataclasses

import numpy as np
import torch

from tests.benchmarks import peer, sides
from tests.benchmarks.timing import Measured, Settings, alternate

POINTS = 7
GROWTH = 2 ** (POINTS - 1)
# Beyond these the other package is left out.
PEER_BYTES, PEER_SECONDS = 2 << 30, 3.0
PEER_ENTRY_BYTES = 24  # per token and code


@dataclasses.dataclass(frozen=True)
class Grow:
    """Measures the training step at powers of 2 of one size, from its given value on."""

    name: str

    def __call__(self, settings: Settings, **sizes: int) -> Measured:
        settings = dataclasses.replace(settings, seconds=settings.seconds / 10)
        points, theirs_is_slow = [], peer.version() is None
        for step in range(POINTS):
            here = {**sizes, self.name: sizes[self.name] * 2**step}
            ours, theirs = _point(settings, here, alone=theirs_is_slow or _too_large(here))
            points.append({"size": here[self.name], "ours": ours, "theirs": theirs})
            theirs_is_slow |= theirs is not None and theirs * here["n"] > 1e6 * PEER_SECONDS
        first, last = points[0], points[-1]
        grown = last["ours"] / first["ours"]
        return Measured(f"times, for {GROWTH} times the size", grown, points=points)


def _too_large(sizes: dict[str, int]) -> bool:
    return sizes["n"] * sizes["k"] * PEER_ENTRY_BYTES > PEER_BYTES


def _point(settings: Settings, sizes: dict[str, int], *, alone: bool) -> tuple[float, float | None]:
    """Returns the median microseconds per token of both sides."""
    data = sides.tokens(settings.device, **sizes)
    ours = sides.train_ours(sides.ours(data).to(settings.device), data.x, data.direction)
    ours()
    theirs = None if alone else sides.train_theirs(sides.theirs(data), data.x, data.direction)
    if theirs is not None:
        theirs()
    seconds = alternate(ours, theirs or torch.empty, settings)
    medians = 1e6 * np.median(seconds, axis=0) / sizes["n"]
    return float(medians[0]), None if theirs is None else float(medians[1])
