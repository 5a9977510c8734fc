"""Structural similarity."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_positive
from vqprior._precision import without_autocast
from vqprior.metrics._images import wide_pair

# All from section III.C of the paper.
_WINDOW = 11
_SIGMA = 1.5
_K1 = 0.01
_K2 = 0.03


def ssim(reconstruction: Tensor, target: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Computes the structural similarity (SSIM) of each image; equal images give 1.

    Statistics use an 11 x 11 Gaussian window of standard deviation 1.5, only where it lies inside
    the image, with ``K1 = 0.01`` and ``K2 = 0.03``. SSIM is averaged over positions and channels.
    Computed in float64 (float32 on Apple GPUs), also under autocast, because variances are
    differences of nearly equal numbers. Pixel values are neither clamped nor rounded.

    Args:
        reconstruction: Images to evaluate.
        target: Reference images.
        data_range: Difference between white and black, greater than 0.

    Returns:
        One float32 value per image, between -1 and 1.

    Raises:
        TypeError: If an image is not floating point.
        ValueError: If the shapes differ or are not ``(b, c, h, w)`` with ``h`` and ``w`` at
            least 11, or ``data_range`` is not greater than 0.

    Shape:
        - ``reconstruction``, ``target``: ``(b, c, h, w)`` with ``h`` and ``w`` at least 11
        - returns: ``(b,)``

    References:
        Wang, Bovik, Sheikh and Simoncelli, *Image Quality Assessment: From Error Visibility to
        Structural Similarity*, IEEE TIP 2004, equations 13 to 17, without the downsampling of
        large images that the authors advised later. <https://doi.org/10.1109/TIP.2003.819861>

    Examples:
        >>> import torch
        >>> from vqprior.metrics import ssim
        >>> image = torch.rand(2, 3, 16, 16)
        >>> torch.allclose(ssim(image, image), torch.ones(2))
        True
    """
    check_positive("data_range", data_range)
    ours, theirs = wide_pair(reconstruction, target, min_size=_WINDOW)
    ours, theirs = ours / data_range, theirs / data_range
    planes = torch.stack([ours, theirs, ours * ours, theirs * theirs, ours * theirs])
    mean, other_mean, square, other_square, product = _blur(planes).unbind()
    variance, other_variance = square - mean.square(), other_square - other_mean.square()
    covariance = product - mean * other_mean
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean * other_mean + c1) / (mean.square() + other_mean.square() + c1)
    structure = (2 * covariance + c2) / (variance + other_variance + c2)
    return (luminance * structure).mean(dim=(1, 2, 3)).float()


def _blur(planes: Tensor) -> Tensor:
    """Computes the means under the window: ``(..., h, w) -> (..., h - 10, w - 10)``."""
    axis = torch.arange(_WINDOW, dtype=planes.dtype, device=planes.device) - _WINDOW // 2
    window = torch.exp(-axis.square() / (2 * _SIGMA**2))
    window = (window / window.sum()).reshape(1, 1, _WINDOW, 1)
    flat = planes.flatten(0, -3).unsqueeze(1)
    with without_autocast(planes.device.type):
        blurred = F.conv2d(F.conv2d(flat, window), window.mT)
    return blurred.reshape(*planes.shape[:-2], *blurred.shape[-2:])
