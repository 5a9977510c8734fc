"""Upscales an image tile by tile, in bounded memory.

A layout (layouts.py) gives the positions and weights of the tiles. The network runs on a few tiles
at a time; weighted results are summed up for one row of tiles, and pixels that no later row adds to
are rounded to integers at once. So floats exist for about one row of tiles.
"""

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Protocol

import torch
from torch import Tensor, nn

from tvqrap.cli import UserError, is_out_of_memory
from tvqrap.images.layouts import Blended, Layout, Placement, Span, Tiling
from tvqrap.images.levels import quantize

DEFAULT_LAYOUT = Blended()
PIECE = 2**20  # pixels that are rounded at a time, to bound the memory of copies


class Upscaler(Protocol):
    """A model that can be run on tiles."""

    @property
    def tiling(self) -> Tiling:
        """How its tiles must be cut."""
        ...

    def __call__(self, lr: Tensor, /) -> Tensor:
        """Maps ``(b, 3, h, w)`` to ``(b, 3, scale * h, scale * w)``."""
        ...


@torch.no_grad()
def upscale_tiled(
    model: Upscaler,
    lr: Tensor,
    layout: Layout = DEFAULT_LAYOUT,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.uint8,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Upscales one image of any size; the whole result exists only as integers.

    Args:
        model: A model in evaluation mode; tiles are moved to its device.
        lr: ``(3, h, w)``, floats in [0, 1], on the CPU.
        layout: Positions and weights of the tiles.
        batch: Largest number of tiles given to the model at once.
        dtype: ``torch.uint8`` or ``torch.uint16``, the levels of the result.
        progress: Called after each batch with the number of finished tiles and of all tiles.

    Returns:
        ``(3, scale * h, scale * w)`` levels, on the CPU.

    Raises:
        UserError: If the tiles of a batch do not fit into memory.
    """
    _, height, width = lr.shape
    scale = model.tiling.scale
    rows, columns = (layout.placements(side, model.tiling) for side in (height, width))
    tick = _counter(len(rows) * len(columns), progress)
    # Channels last in memory, as in image files and in the network's output.
    levels = torch.empty(height * scale, width * scale, 3, dtype=dtype)
    strip = torch.zeros(max(len(row.weights) for row in rows), width * scale, 3)
    for row, following in zip_longest(rows, rows[1:]):
        for tiles in _batches(columns, batch):
            results = _upscale(model, lr, row.seen, [tile.seen for tile in tiles])
            for tile, result in zip(tiles, results, strict=True):
                _add(strip, row, tile, result, scale)
            tick(len(tiles))
        start = row.used[0] * scale
        end = height * scale if following is None else following.used[0] * scale
        _quantize(strip[: end - start], levels[start:end])
        rest = strip[end - start : len(row.weights)].clone()  # what the next row adds to
        strip[: len(rest)] = rest
        strip[len(rest) :] = 0
    return levels.permute(2, 0, 1)


def _batches(tiles: Sequence[Placement], most: int) -> list[Sequence[Placement]]:
    """Cuts into few batches of similar size: each new size may be compiled again."""
    count = -(-len(tiles) // most)
    size = -(-len(tiles) // count)
    return [tiles[i : i + size] for i in range(0, len(tiles), size)]


def _upscale(model: Upscaler, lr: Tensor, rows: Span, columns: Sequence[Span]) -> Tensor:
    """Returns the results of tiles of one row: floats ``(b, 3, rows, columns)`` on the CPU."""
    seen = [lr[:, rows[0] : rows[1], left:right] for left, right in columns]
    try:
        return model(torch.stack(seen).to(device_of(model))).float().cpu()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = f"{seen[0].shape[2]}x{seen[0].shape[1]} pixels"
        if len(seen) == 1:
            message = f"not enough memory for a tile of {size}; pass a smaller --tile"
        else:
            message = (
                f"not enough memory for {len(seen)} tiles of {size}; "
                "pass a smaller --batch or a smaller --tile"
            )
        raise UserError(message) from error


def _add(strip: Tensor, row: Placement, column: Placement, result: Tensor, scale: int) -> None:
    """Adds the used part of a tile's result ``(3, rows, columns)``, weighted, to the strip."""
    top, left = ((at.used[0] - at.seen[0]) * scale for at in (row, column))
    height, width = len(row.weights), len(column.weights)
    used = result[:, top : top + height, left : left + width].permute(1, 2, 0)
    start = column.used[0] * scale
    weights = torch.outer(row.weights, column.weights)[..., None]
    strip[:height, start : start + width].addcmul_(used, weights)


def _quantize(values: Tensor, levels: Tensor) -> None:
    """Rounds floats ``(rows, columns, 3)`` to levels of that shape."""
    rows = max(1, PIECE // values.shape[1])
    for piece, target in zip(values.split(rows), levels.split(rows), strict=True):
        target.copy_(quantize(piece, levels.dtype))


def device_of(model: object) -> torch.device:
    """Returns the device of the model's tensors; the CPU if it has none."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return tick
