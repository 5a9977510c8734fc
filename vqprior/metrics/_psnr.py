"""Peak signal-to-noise ratio."""

from torch import Tensor

from vqprior._checks import check_positive
from vqprior.metrics._images import wide_pair


def psnr(reconstruction: Tensor, target: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Computes the peak signal-to-noise ratio (PSNR) of each image in dB.

    ``10 log10(data_range^2 / mse)`` with the mean over channels and pixels, in float64 (float32 on
    Apple GPUs); infinite for equal images. Pixel values are neither clamped nor rounded.

    Args:
        reconstruction: Images to evaluate.
        target: Reference images.
        data_range: Difference between white and black, greater than 0.

    Returns:
        One float32 value per image.

    Raises:
        TypeError: If an image is not floating point.
        ValueError: If the shapes differ or are not ``(b, c, h, w)``, or ``data_range`` is not
            greater than 0.

    Shape:
        - ``reconstruction``, ``target``: ``(b, c, h, w)``
        - returns: ``(b,)``

    References:
        Huynh-Thu and Ghanbari, *Scope of Validity of PSNR in Image/Video Quality Assessment*,
        Electronics Letters 2008, equation 1.

    Examples:
        >>> import torch
        >>> from vqprior.metrics import psnr
        >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1))
        tensor([20.])
    """
    check_positive("data_range", data_range)
    ours, theirs = wide_pair(reconstruction, target, min_size=1)
    difference = (ours - theirs) / data_range
    return (-10 * difference.square().mean(dim=(1, 2, 3)).log10()).float()
