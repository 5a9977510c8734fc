"""Layouts: positions and weights of the tiles of an image.

Rows and columns are laid out independently: a layout makes a list of ``Placement`` for each axis,
and the tiles are all pairs of them. A pixel of the result is the weighted mean over the tiles that
cover it, with the products of their weights along the two axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SMALLEST_TILE = 32
STRIDE_STEP = 8  # input pixels; the authors' stride is a multiple of it

Span = tuple[int, int]  # start and end, in input pixels


@dataclass(frozen=True)
class Tiling:
    """The properties of a model that determine how to cut images into tiles.

    Lengths are in input pixels along a side.

    Attributes:
        multiple: The model pads its input to a multiple of this.
        overlap: Pixels at the border of a tile that are computed but not used. If it is at least
            ``multiple``, nothing beyond ``overlap`` may influence a pixel; tiles then start at
            multiples of ``multiple`` and give the result of the whole image. If it is less, tiles
            are not exact and start anywhere.
        blend: Half the width over which two neighboring tiles are blended.
        default_tile: Default side of a tile.
        scale: Result pixels per input pixel along a side.
    """

    multiple: int
    overlap: int
    blend: int = 4
    default_tile: int = 256
    scale: int = 4


def reflect(image: Tensor, multiple: int) -> Tensor:
    """Pads ``(..., h, w)`` by reflection at the bottom and right, to multiples of ``multiple``.

    The last row is not repeated; images smaller than the padding are reflected several times.
    """
    for dim in (-2, -1):
        side = image.shape[dim]
        if missing := -side % multiple:
            order = np.pad(np.arange(side), (0, missing), mode="reflect")
            image = image.index_select(dim, torch.from_numpy(order).to(image.device))
    return image


@dataclass(frozen=True)
class Placement:
    """One tile along one axis.

    Attributes:
        seen: Pixels that the network gets; all tiles along an axis have the same length.
        used: Pixels whose result is used, within ``seen``.
        weights: ``(scale * used pixels,)``, the weight of each pixel of the used result; the
            weights of overlapping tiles sum to 1.
    """

    seen: Span
    used: Span
    weights: Tensor


class Layout(Protocol):
    """A way to cut images into tiles: ``Blended`` or ``Averaged``."""

    def placements(self, side: int, tiling: Tiling) -> list[Placement]:
        """Returns the tiles that cover a side of ``side`` input pixels."""
        ...


@dataclass(frozen=True)
class Blended:
    """Overlapping tiles, blended linearly.

    Except at the border of the image, the outer ``tiling.overlap`` input pixels of a tile are not
    used. Over ``tiling.blend`` pixels on either side of the border between two tiles, the weight of
    one falls linearly from 1 to 0 as the other's rises, so that small differences make no edge.

    The layout has as few tiles as possible, all of the same size (one shape for batches and for
    compilers): tiles at the border of the image extend farther to the inside.

    Attributes:
        tile: Input pixels along a side that a tile adds to those before it; it sees at most
            ``2 * (overlap + blend)`` pixels more, rounded up to the model's ``multiple``. ``None``
            for the model's ``default_tile``.
    """

    tile: int | None = None

    def placements(self, side: int, tiling: Tiling) -> list[Placement]:
        """See ``Layout``."""
        starts, length = self._cut(side, tiling)
        shared = [(start, before + length) for before, start in pairwise(starts)]
        borders = [(start + end) // 2 for start, end in shared]
        tiles = []
        for i, start in enumerate(starts):
            used = (
                borders[i - 1] - tiling.blend if i else 0,
                borders[i] + tiling.blend if i < len(borders) else side,
            )
            weights = _ramps(used, 2 * tiling.blend, side, tiling.scale)
            tiles.append(Placement((start, start + length), used, weights))
        return _normalized(tiles, side * tiling.scale)

    def _cut(self, side: int, tiling: Tiling) -> tuple[list[int], int]:
        """Returns the starts of the tiles, and their length."""
        common = 2 * (tiling.overlap + tiling.blend)  # seen by two neighbors
        most = _up((self.tile or tiling.default_tile) + common, tiling.multiple)
        fewest = max(1, -(-(side - common) // (most - common)))
        # With large multiples, more and smaller tiles may need less work in total.
        options = [_equal(side, count, common, tiling) for count in range(fewest, 2 * fewest + 1)]
        return min(options, key=lambda cut: len(cut[0]) * _up(cut[1], tiling.multiple))


@dataclass(frozen=True)
class Averaged:
    """The authors' layout: tiles at a fixed stride, averaged where they overlap.

    A tile that would pass the end of the image is moved back to end there, so the last two may
    overlap more.

    Attributes:
        tile: Side of a tile in input pixels; a shorter image is one tile.
        stride: Input pixels from one tile to the next.
    """

    tile: int = 768
    stride: int = 688

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.tile:
            raise ValueError(
                f"`stride` must be from 1 to `tile` = {self.tile}, got {self.stride}. A larger one "
                "would leave pixels out."
            )

    @classmethod
    def of_size(cls, tile: int) -> "Averaged":
        """Returns a layout of tiles of another size, with the authors' ratio of stride to tile."""
        return cls(tile, tile * cls.stride // cls.tile // STRIDE_STEP * STRIDE_STEP)

    def placements(self, side: int, tiling: Tiling) -> list[Placement]:
        """See ``Layout``."""
        length = min(self.tile, side)
        starts = {min(start, side - length) for start in range(0, side, self.stride)}
        spans = [(start, start + length) for start in sorted(starts)]
        equal = torch.ones(length * tiling.scale)
        return _normalized([Placement(span, span, equal) for span in spans], side * tiling.scale)


def seen_share(layout: Layout, tiling: Tiling, height: int, width: int) -> float:
    """Returns the input pixels that the network computes, padding included, per image pixel."""
    seen = 1
    for side in (height, width):
        tiles = layout.placements(side, tiling)
        seen *= sum(_up(tile.seen[1] - tile.seen[0], tiling.multiple) for tile in tiles)
    return seen / (height * width)


def _equal(side: int, count: int, common: int, tiling: Tiling) -> tuple[list[int], int]:
    """Lays out at most ``count`` tiles of one length; neighbors share ``common`` pixels or more."""
    if tiling.overlap < tiling.multiple:  # starts anywhere; pixels up to a multiple are free
        grid, length = 1, _up(-(-(side + (count - 1) * common) // count), tiling.multiple)
    else:
        # Starts are multiples of the grid, and lengths are, except for the remainder of the side.
        grid = tiling.multiple
        cells, rest = divmod(side, grid)
        least = -(-(common - rest) // grid)
        length = rest + grid * (least - (least - cells) // count)
    if count == 1 or length >= side:
        return [0], side
    steps = (side - length) // grid
    # With fewer steps than tiles, some tiles would be identical.
    starts = {grid * (i * steps // (count - 1)) for i in range(count)}
    return sorted(starts), length


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _ramps(used: Span, width: int, side: int, scale: int) -> Tensor:
    """Returns ones that ramp from 0 and to 0 over ``width``, except at the ends of the side."""
    weights = torch.ones((used[1] - used[0]) * scale)
    rise = (torch.arange(width * scale) + 0.5) / (width * scale)
    if used[0] > 0:
        weights[: len(rise)] = rise
    if used[1] < side:
        fall = weights[len(weights) - len(rise) :]
        fall.copy_(torch.minimum(fall, rise.flip(0)))
    return weights


def _normalized(tiles: Sequence[Placement], length: int) -> list[Placement]:
    """Divides the weights by their sum at each of the ``length`` result pixels."""
    total = torch.zeros(length)
    places = []
    for tile in tiles:
        scale = len(tile.weights) // (tile.used[1] - tile.used[0])
        places.append(total[tile.used[0] * scale : tile.used[1] * scale])
        places[-1].add_(tile.weights)
    return [
        replace(tile, weights=tile.weights / place)
        for tile, place in zip(tiles, places, strict=True)
    ]
