"""Index arithmetic of attention windows on feature maps of any size."""

import functools
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Integers: TypeAlias = npt.NDArray[np.int64]

# Enough for two shifts at eight map sizes. An entry holds two integers per position and the offsets
# of a few windows, much less than a feature map.
_REMEMBERED = 16


class Windows(NamedTuple):
    """The positions of a batch sorted by window, with windows of one shape adjacent.

    Attributes:
        order: Flat positions in sorted order, ``(b * h * w,)``.
        place: Where each position went: the inverse of ``order``.
        offsets: Indices of the relative offsets within one window of each shape, concatenated.
        shapes: For each shape, the number of windows and the number of positions per window.
    """

    order: Tensor
    place: Tensor
    offsets: Tensor
    shapes: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=_REMEMBERED)
def arrange_windows(
    batch: int, height: int, width: int, window_size: int, shift: int, device: torch.device
) -> Windows:
    """Sorts the positions of ``batch`` maps by window.

    The result is cached and shared, so do not write to it, and do not call this while tracing:
    traced tensors would leak into other calls.
    """
    images = np.arange(batch)[:, None] * (height * width)
    order, offsets, shapes = [], [], []
    for rows in _pieces(height, window_size, shift):
        for columns in _pieces(width, window_size, shift):
            positions = rows[:, None, :, None] * width + columns[None, :, None, :]
            order.append((images + positions.ravel()).ravel())
            sides = rows.shape[1], columns.shape[1]
            offsets.append(name_offsets(window_size, *sides).ravel())
            shapes.append((batch * len(rows) * len(columns), sides[0] * sides[1]))
    joined = np.concatenate(order)
    place = np.empty_like(joined)
    place[joined] = np.arange(len(joined))
    # The first caller may be in inference mode, and the next one may need gradients.
    with torch.inference_mode(mode=False):
        return Windows(
            order=torch.from_numpy(joined).to(device),
            place=torch.from_numpy(place).to(device),
            offsets=torch.from_numpy(np.concatenate(offsets)).to(device),
            shapes=tuple(shapes),
        )


def name_offsets(window_size: int, rows: int, columns: int) -> _Integers:
    """Numbers the offset between any two positions of a window: ``(rows * columns,) * 2``.

    An offset has the same number in every window of at most ``window_size`` rows and columns.
    """
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    down = row[:, None] - row + window_size - 1
    right = column[:, None] - column + window_size - 1
    names: _Integers = down * (2 * window_size - 1) + right
    return names


def _pieces(size: int, window_size: int, shift: int) -> list[_Integers]:
    """Splits an axis into windows: for each length, the positions ``(pieces, length)``."""
    edges = sorted({0, *range(shift or window_size, size, window_size), size})
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(edges):
        starts.setdefault(end - start, []).append(start)
    return [
        np.array(first, dtype=np.int64)[:, None] + np.arange(length)
        for length, first in starts.items()
    ]
