"""The loss of JPEG compression, computed in torch on the device of the image.

Standard: ITU-T T.81. The scaling of its tables by quality, the chroma subsampling and the smooth
upsampling are those of libjpeg.
"""

import functools
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

# Example tables of the standard (annex K): quantization steps at quality 50, by frequency.
LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
BLOCK = 8
UNIT = 2 * BLOCK  # pixels along a side that one block of a chroma channel covers


def jpeg(image: Tensor, quality: float | Tensor) -> Tensor:
    """Compresses and decompresses images: 4:2:0, quantized coefficients, no entropy coding.

    On a GPU, matrix products follow ``torch.backends.cuda.matmul.allow_tf32``, off by default.

    Args:
        image: ``(b, 3, h, w)`` RGB in [0, 1], float32, of any size.
        quality: 1 to 100 as in libjpeg, fractions allowed; or one per image, ``(b,)`` on its
            device, which is not checked: on a GPU the check would force a synchronization.

    Returns:
        ``(b, 3, h, w)`` in [0, 1], not rounded to 8 bits.

    Raises:
        ValueError: If the quality is a number out of range.
    """
    if not isinstance(quality, Tensor) and not 1 <= quality <= 100:
        raise ValueError(f"`quality` must be in [1, 100], got {quality}.")
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % UNIT, 0, -height % UNIT), mode="replicate")
    luma, chroma = _to_luma_and_chroma(padded * 255)
    luma = _requantize(luma, scaled_steps(LUMA_STEPS, quality))
    chroma = _requantize(F.avg_pool2d(chroma, 2), scaled_steps(CHROMA_STEPS, quality))
    # Bilinear, as decoders do by default; nearest would leave squares of color.
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    rgb = _to_rgb(luma, chroma) / 255
    return rgb[..., :height, :width].clamp(0, 1)


@dataclass(frozen=True)
class Jpeg:
    """A compression step."""

    quality: float

    def __call__(self, image: Tensor, scene: object = None) -> Tensor:
        """Maps ``(b, 3, h, w)`` to the same shape; clamps it to [0, 1] first, as resizing may
        leave the range.
        """
        return jpeg(image.clamp(0, 1), self.quality)


def _to_luma_and_chroma(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Maps levels of 0 to 255 to luma ``(b, 1, h, w)`` and chroma ``(b, 2, h, w)``, both centered
    at 0.
    """
    red, green, blue = rgb.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], dim=1)
    return luma[:, None] - 128, chroma


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    blueness, redness = chroma.unbind(1)
    luma = luma[:, 0] + 128
    red, blue = luma + 1.402 * redness, luma + 1.772 * blueness
    green = luma - (0.299 * 1.402 * redness + 0.114 * 1.772 * blueness) / 0.587
    return torch.stack([red, green, blue], dim=1)


def scaled_steps(table: tuple[tuple[int, ...], ...], quality: float | Tensor) -> Tensor:
    """Returns the quantization steps for a quality: ``(8, 8)`` whole numbers of 1 to 255.

    For qualities ``(b,)`` they are ``(b, 1, 1, 1, 8, 8)``, to broadcast with the blocks.
    """
    if isinstance(quality, Tensor):
        percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).floor()
        percent = percent[:, None, None, None, None, None]
        return ((_table(table, quality.device) * percent + 50) / 100).floor().clamp(1, 255)
    percent = math.floor(5000 / quality if quality < 50 else 200 - 2 * quality)
    return ((torch.tensor(table) * percent + 50) / 100).floor().clamp(1, 255)


@functools.cache
def _table(table: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Returns a table on a device; cached, because each copy would force a synchronization."""
    return torch.tensor(table, device=device)


def _requantize(channels: Tensor, steps: Tensor) -> Tensor:
    """Rounds the cosine coefficients of every 8 x 8 block to multiples of their steps."""
    blocks = rearrange(channels, "b c (h i) (w j) -> b c h w i j", i=BLOCK, j=BLOCK)
    cosines, steps = _cosines(channels.device).to(channels), steps.to(channels)
    coefficients = cosines @ blocks @ cosines.T
    blocks = cosines.T @ ((coefficients / steps).round() * steps) @ cosines
    return rearrange(blocks, "b c h w i j -> b c (h i) (w j)")


@functools.cache
def _cosines(device: torch.device) -> Tensor:
    """Returns the orthonormal discrete cosine transform, ``(frequency, position)``."""
    line = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(torch.outer(line, 2 * line + 1) * math.pi / (2 * BLOCK))
    matrix[0] /= math.sqrt(2)
    return (matrix * math.sqrt(2 / BLOCK)).to(device)
