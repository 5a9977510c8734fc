"""Luma of images, and input checks that image metrics share."""

import torch
from torch import Tensor

from vqprior._checks import check_feature_map, check_floating, check_shape
from vqprior._precision import widest_float

_COEFFICIENTS = (65.481, 128.553, 24.966)
_OFFSET = 16.0


def rgb_to_luma(image: Tensor) -> Tensor:
    """Converts RGB to the studio-swing luma of ITU-R BT.601: black is 16/255, white is 235/255.

    ``Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255``, as MATLAB's ``rgb2ycbcr`` computes it
    before rounding. Papers on upscaling report PSNR and SSIM "on the Y channel" with this luma.

    Args:
        image: Red, green and blue in ``[0, 1]``.

    Returns:
        The luma, in float32 or wider.

    Raises:
        TypeError: If ``image`` is not floating point.
        ValueError: If ``image`` is not of shape ``(b, 3, h, w)``.

    Shape:
        - ``image``: ``(b, 3, h, w)``
        - returns: ``(b, 1, h, w)``

    References:
        Recommendation ITU-R BT.601-7, 2011, section 2.5, scaled to 255.
        <https://www.itu.int/rec/R-REC-BT.601>

    Examples:
        >>> import torch
        >>> from vqprior.metrics import rgb_to_luma
        >>> 255 * rgb_to_luma(torch.zeros(1, 3, 1, 1)), 255 * rgb_to_luma(torch.ones(1, 3, 1, 1))
        (tensor([[[[16.]]]]), tensor([[[[235.]]]]))
    """
    check_feature_map("image", image, 3)
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    return weighted_sum(wide, _COEFFICIENTS).add(_OFFSET).div(255)


def weighted_sum(image: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Computes a weighted sum of three channels: ``(b, 3, h, w) -> (b, 1, h, w)``."""
    red, green, blue = image[:, :1], image[:, 1:2], image[:, 2:]
    return weights[0] * red + weights[1] * green + weights[2] * blue


def wide_pair(reconstruction: Tensor, target: Tensor, *, min_size: int) -> tuple[Tensor, Tensor]:
    """Checks two batches of images and returns them in the widest dtype of their device."""
    check_feature_map("reconstruction", reconstruction, None, min_size=min_size)
    check_floating("target", target)
    check_shape("target", target, reconstruction.shape)
    dtype = widest_float(reconstruction.device)
    return reconstruction.to(dtype), target.to(dtype)
