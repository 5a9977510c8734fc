"""Where the tiles of an image lie, and how much each counts where several give a pixel.

Rows and columns are laid out alike and independently: along each axis a layout makes a list of
``Placement``, and the tiles are all pairs of one from each list. A pixel of the result is the mean
of what the tiles that use it give, weighted by the products of their weights along the two axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SMALLEST_TILE = 32
STRIDE_STEP = 8  # input pixels; what the authors' stride, too, is a multiple of

Span = tuple[int, int]  # start and end, in input pixels


@dataclass(frozen=True)
class Tiling:
    """What must be known of a model to cut images into tiles for it.

    Lengths are in input pixels along a side.

    Attributes:
        multiple: The model pads its input up to a multiple of this.
        overlap: What is seen at the border of a tile but not used. A model of which nothing beyond
            ``overlap`` influences a pixel says at least ``multiple``; its tiles begin at multiples
            of ``multiple``, as cells of the whole image do, and give what the whole image gives.
            One that says less can never be exact, and its tiles begin anywhere.
        blend: On either side of a border, over how much two tiles are mixed.
        default_tile: The side of a tile, where the user does not say.
        scale: Result pixels for each input pixel.
    """

    multiple: int
    overlap: int
    blend: int = 4
    default_tile: int = 256
    scale: int = 4


def reflect(image: Tensor, multiple: int) -> Tensor:
    """Mirrors ``(..., h, w)`` at the bottom and on the right, up to multiples of ``multiple``.

    The last row is not repeated; an image smaller than what it lacks is mirrored several times.
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
        seen: What the network gets. All tiles along an axis see equally much.
        used: What of the tile's result is used, within ``seen``.
        weights: ``(scale * used pixels,)``, of each pixel of the used result; where tiles overlap
            their weights sum to 1.
    """

    seen: Span
    used: Span
    weights: Tensor


class Layout(Protocol):
    """A way to cut images into tiles."""

    def placements(self, side: int, tiling: Tiling) -> list[Placement]:
        """Lays out tiles along a side of ``side`` input pixels, from its start to its end."""
        ...


@dataclass(frozen=True)
class Blended:
    """Tiles that see more than is used of them, and give way to each other linearly.

    What is used of a tile ends ``tiling.overlap`` input pixels before what it sees, if that is not
    the border of the image, and over ``tiling.blend`` pixels on either side of the border between
    two tiles the weight of one falls from 1 to 0 as the other's rises. So whatever little
    difference the overlap has left can nowhere make an edge.

    The tiles are as few as possible, and all see equally much (one shape for batches, and for
    compilers): at the border of the image they see the farther to the other side.

    Attributes:
        tile: Input pixels along a side that a tile adds to those before it; what it sees besides
            is no more than twice ``overlap + blend``, up to the model's ``multiple``. ``None`` for
            the model's ``default_tile``.
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
        """Returns where tiles start to see, and how much they see."""
        common = 2 * (tiling.overlap + tiling.blend)  # what two neighbors both see
        most = _up((self.tile or tiling.default_tile) + common, tiling.multiple)
        fewest = max(1, -(-(side - common) // (most - common)))
        # With large multiples, more and smaller tiles may come to less in all.
        options = [_equal(side, count, common, tiling) for count in range(fewest, 2 * fewest + 1)]
        return min(options, key=lambda cut: len(cut[0]) * _up(cut[1], tiling.multiple))


@dataclass(frozen=True)
class Averaged:
    """The layout of the paper's authors: whole tiles at a fixed stride, with equal weights.

    A tile that would pass the end of the image is moved back to end there; so the last two may
    have much in common. Where tiles overlap, the mean is taken.

    Attributes:
        tile: Input pixels along the side of a tile; a shorter image is one tile.
        stride: Input pixels from one tile to the next.
    """

    tile: int = 768
    stride: int = 688

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.tile:
            raise ValueError(
                f"`stride` must be from 1 to `tile` = {self.tile}, or pixels would be left out; "
                f"got {self.stride}"
            )

    @classmethod
    def of_size(cls, tile: int) -> "Averaged":
        """Tiles of any size of at least 32, which overlap in the authors' proportion."""
        return cls(tile, tile * cls.stride // cls.tile // STRIDE_STEP * STRIDE_STEP)

    def placements(self, side: int, tiling: Tiling) -> list[Placement]:
        """See ``Layout``."""
        length = min(self.tile, side)
        starts = {min(start, side - length) for start in range(0, side, self.stride)}
        spans = [(start, start + length) for start in sorted(starts)]
        equal = torch.ones(length * tiling.scale)
        return _normalized([Placement(span, span, equal) for span in spans], side * tiling.scale)


def seen_share(layout: Layout, tiling: Tiling, height: int, width: int) -> float:
    """Input pixels that the network computes on, with its padding, for each of the image's."""
    seen = 1
    for side in (height, width):
        tiles = layout.placements(side, tiling)
        seen *= sum(_up(tile.seen[1] - tile.seen[0], tiling.multiple) for tile in tiles)
    return seen / (height * width)


def _equal(side: int, count: int, common: int, tiling: Tiling) -> tuple[list[int], int]:
    """At most ``count`` tiles of one length, of which neighbors have ``common`` pixels or more."""
    if tiling.overlap < tiling.multiple:  # starts anywhere; more to see is free up to a multiple
        grid, length = 1, _up(-(-(side + (count - 1) * common) // count), tiling.multiple)
    else:
        # Starts are multiples of the grid, and so are lengths but for what the side has left over.
        grid = tiling.multiple
        cells, rest = divmod(side, grid)
        least = -(-(common - rest) // grid)
        length = rest + grid * (least - (least - cells) // count)
    if count == 1 or length >= side:
        return [0], side
    steps = (side - length) // grid
    # Where there are fewer steps than tiles, some would be the same.
    starts = {grid * (i * steps // (count - 1)) for i in range(count)}
    return sorted(starts), length


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _ramps(used: Span, width: int, side: int, scale: int) -> Tensor:
    """Ones that rise from 0 and fall to 0 over ``width``, except at the ends of the side."""
    weights = torch.ones((used[1] - used[0]) * scale)
    rise = (torch.arange(width * scale) + 0.5) / (width * scale)
    if used[0] > 0:
        weights[: len(rise)] = rise
    if used[1] < side:
        fall = weights[len(weights) - len(rise) :]
        fall.copy_(torch.minimum(fall, rise.flip(0)))
    return weights


def _normalized(tiles: Sequence[Placement], length: int) -> list[Placement]:
    """Divides the weights by their sum at each of the ``length`` pixels of a result's side."""
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
