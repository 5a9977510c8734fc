"""Enlarging a picture tile by tile, in bounded memory and without seams.

Two measures keep tiles from showing. Each tile is computed with ``model.overlap`` more pixels on
every side than are used of it, so what is used is what the whole picture would have given. And
where the tiles meet they are blended over a few pixels with weights that rise linearly from 0 to 1
and sum to 1, so whatever little difference is left can nowhere make an edge.
"""

from collections.abc import Callable
from itertools import chain, pairwise
from typing import Protocol

import torch
from cli import UserError, is_out_of_memory
from images import quantize
from torch import Tensor, nn

DEFAULT_TILE = 256
SMALLEST_TILE = 32
BLEND = 4  # low-resolution pixels on either side of a border over which two tiles are mixed

Span = tuple[int, int]  # start and end, in low-resolution pixels


class Enlarger(Protocol):
    """What a model must have to be used here."""

    @property
    def scale(self) -> int:
        """Result pixels for each input pixel, along a side."""
        ...

    @property
    def overlap(self) -> int:
        """Input pixels beyond which nothing influences a pixel of the result."""
        ...

    @property
    def multiple(self) -> int:
        """Tiles that begin at multiples of this are treated as the whole picture is."""
        ...

    def __call__(self, lr: Tensor, /) -> Tensor:
        """Maps ``(b, 3, h, w)`` to ``(b, 3, scale * h, scale * w)``."""
        ...


@torch.no_grad()
def upscale_tiled(
    model: Enlarger,
    lr: Tensor,
    *,
    tile: int = DEFAULT_TILE,
    dtype: torch.dtype = torch.uint8,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Enlarges one picture of any size; the whole result exists only as integers.

    Args:
        model: in evaluation mode; tiles are moved to its device.
        lr: ``(3, h, w)``, floats in [0, 1], on the CPU.
        tile: input pixels along the side of a tile, besides what it overlaps; pictures up to
            this size are enlarged in one piece.
        dtype: ``torch.uint8`` or ``torch.uint16``, the levels of the result.
        progress: called with the number of finished tiles and of all tiles, after each.

    Returns:
        ``(3, scale * h, scale * w)`` levels, on the CPU.

    Raises:
        UserError: a tile does not fit into memory.
    """
    _, height, width = lr.shape
    rows, columns = (_spans(side, tile, model.multiple) for side in (height, width))
    tick = _counter(len(rows) * len(columns), progress)
    # Channels last in memory, as picture files want it.
    levels = torch.empty(height * model.scale, width * model.scale, 3, dtype=dtype)
    result = levels.permute(2, 0, 1)
    lower_edge = None
    for row in rows:
        strip = _strip(model, lr, row, columns, tick)
        if lower_edge is not None:
            _blend(lower_edge, strip, dim=1)
        start = max(row[0] - BLEND, 0) * model.scale
        lower_edge = strip[:, -2 * BLEND * model.scale :].clone()
        for left, part in _pieces(strip):
            target = result[:, start : start + strip.shape[1], left : left + part.shape[2]]
            target.copy_(quantize(part, dtype))
    return result


def _spans(side: int, tile: int, multiple: int) -> list[Span]:
    """Cuts a side into equal parts of at most about ``tile``, at multiples of ``multiple``."""
    tile = max(tile, SMALLEST_TILE, 4 * multiple)  # then every part is longer than a blend
    count = -(-side // tile)
    inner = [round(side * i / count / multiple) * multiple for i in range(1, count)]
    return list(pairwise([0, *inner, side]))


def _strip(
    model: Enlarger, lr: Tensor, row: Span, columns: list[Span], tick: Callable[[], None]
) -> Tensor:
    """One row of tiles as floats ``(3, rows, all columns)``, joined from left to right."""
    top, bottom = _grow(row, BLEND, lr.shape[1])
    strip = torch.empty(3, (bottom - top) * model.scale, lr.shape[2] * model.scale)
    for column in columns:
        left, right = _grow(column, BLEND, lr.shape[2])
        part = _enlarge(model, lr, (top, bottom), (left, right))
        target = strip[..., left * model.scale : right * model.scale]
        if left > 0:
            _blend(target[..., : 2 * BLEND * model.scale], part, dim=2)
        target.copy_(part)
        tick()
    return strip


def _enlarge(model: Enlarger, lr: Tensor, rows: Span, columns: Span) -> Tensor:
    """The result for a part of the picture, computed with the surroundings it depends on."""
    (top, bottom), (left, right) = (
        _grow(span, model.overlap, side, model.multiple)
        for span, side in zip((rows, columns), lr.shape[1:], strict=True)
    )
    seen = lr[None, :, top:bottom, left:right].to(device_of(model))
    try:
        enlarged = model(seen)[0]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory for a tile of {right - left}x{bottom - top} pixels; "
            "pass a smaller --tile"
        ) from error
    y, x = (rows[0] - top) * model.scale, (columns[0] - left) * model.scale
    height, width = ((end - start) * model.scale for start, end in (rows, columns))
    return enlarged[:, y : y + height, x : x + width].float().cpu()


def _grow(span: Span, margin: int, side: int, multiple: int = 1) -> Span:
    start = max(span[0] - margin, 0) // multiple * multiple
    return start, min(span[1] + margin, side)


def _blend(before: Tensor, after: Tensor, dim: int) -> None:
    """Mixes ``before`` into the beginning of ``after``, which it gives way to linearly."""
    length = before.shape[dim]
    weight = (torch.arange(length) + 0.5) / length
    start = after.narrow(dim, 0, length)
    start.copy_(torch.lerp(before, start, weight if dim == 2 else weight[:, None]))


def _pieces(strip: Tensor, width: int = 4096) -> list[tuple[int, Tensor]]:
    """The strip in pieces small enough that a few copies of one do not matter."""
    return [(i * width, part) for i, part in enumerate(strip.split(width, dim=2))]


def device_of(model: object) -> torch.device:
    """Where the model's tensors are; the CPU if it has none."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _counter(total: int, progress: Callable[[int, int], None] | None) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick
