"""Converts colors between floats in [0, 1], integer levels and Pillow images."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BICUBIC = Image.Resampling.BICUBIC
ROWS = 256  # that are converted at a time


def to_pillow(values: Tensor) -> Image.Image:
    """Converts ``(3, h, w)`` or ``(1, h, w)``, floats in [0, 1] or levels, to 8-bit RGB or gray."""
    levels = values if values.dtype == torch.uint8 else in_strips(_to_eight_bit, values)
    return Image.fromarray(levels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def from_pillow(image: Image.Image) -> Tensor:
    """Converts an 8-bit image to ``uint8`` levels ``(channels, h, w)``."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def quantize(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds floats, clamped to [0, 1], to the nearest levels of ``uint8`` or ``uint16``."""
    top = torch.iinfo(dtype).max
    # Via int32, because few kernels exist for uint16.
    return values.float().clamp(0, 1).mul(top).round_().to(torch.int32).to(dtype)


def to_float(values: Tensor) -> Tensor:
    """Converts levels of ``uint8`` or ``uint16`` to floats in [0, 1]; keeps floats."""
    if values.is_floating_point():
        return values
    return values.float() / torch.iinfo(values.dtype).max


def in_strips(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Applies ``function`` to some rows at a time, to bound the memory of intermediate floats."""
    return torch.cat([function(strip) for strip in values.split(ROWS, dim=1)], dim=1)


def upscale_plane(plane: Tensor, scale: int, dtype: torch.dtype) -> Tensor:
    """Upscales ``(1, h, w)`` in [0, 1] bicubically, to levels of ``uint8`` or ``uint16``.

    Strip by strip, because Pillow needs floats for 16 bits.
    """
    deep = dtype == torch.uint16
    image = Image.fromarray(plane[0].numpy()) if deep else to_pillow(plane)
    _, height, width = plane.shape
    levels = torch.empty(1, height * scale, width * scale, dtype=dtype)
    for top in range(0, height, ROWS):
        bottom = min(top + ROWS, height)
        size = (width * scale, (bottom - top) * scale)
        # Pillow also reads the rows around the box.
        strip = from_pillow(image.resize(size, BICUBIC, box=(0, top, width, bottom)))
        levels[:, top * scale : bottom * scale] = quantize(strip, dtype) if deep else strip
    return levels


def _to_eight_bit(values: Tensor) -> Tensor:
    return quantize(to_float(values), torch.uint8)
