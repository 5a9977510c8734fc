"""Gradient magnitude similarity deviation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_positive
from vqprior._precision import without_autocast
from vqprior.metrics._images import weighted_sum, wide_pair

# From section III of the paper, for images in [0, 255].
_C = 170 / 255**2
# Full-swing luma of ITU-R BT.601, to match the gray images of the paper.
_LUMA = (0.299, 0.587, 0.114)


def gmsd(reconstruction: Tensor, target: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Computes the gradient magnitude similarity deviation (GMSD) of each image.

    Lower is better; equal images give 0. It is the standard deviation over positions of
    ``(2 g g' + c) / (g^2 + g'^2 + c)``, where ``g`` and ``g'`` are the two gradient magnitudes:
    Prewitt filters on the luma after 2 x 2 averaging, with ``c = 170 / 255^2``. The luma of color
    images is the full-swing ``0.299 R + 0.587 G + 0.114 B``, not that of ``rgb_to_luma``. Computed
    in float64 (float32 on Apple GPUs), also under autocast.

    Args:
        reconstruction: Images to evaluate, in color or gray.
        target: Reference images.
        data_range: Difference between white and black, greater than 0.

    Returns:
        One float32 value per image, at least 0.

    Raises:
        TypeError: If an image is not floating point.
        ValueError: If the shapes differ or are not ``(b, 3, h, w)`` or ``(b, 1, h, w)`` with
            ``h`` and ``w`` at least 2, or ``data_range`` is not greater than 0.

    Shape:
        - ``reconstruction``, ``target``: ``(b, 3, h, w)`` or ``(b, 1, h, w)``, with ``h`` and
          ``w`` at least 2; an odd last row or column is ignored
        - returns: ``(b,)``

    References:
        Xue, Zhang, Mou and Bovik, *Gradient Magnitude Similarity Deviation: A Highly Efficient
        Perceptual Image Quality Index*, IEEE TIP 2014, equations 1 to 6; borders are padded with
        zeros, as in the authors' code. <https://arxiv.org/abs/1308.3052>

    Examples:
        >>> import torch
        >>> from vqprior.metrics import gmsd
        >>> image = torch.rand(1, 3, 32, 32)
        >>> gmsd(image, image)
        tensor([0.])
    """
    check_positive("data_range", data_range)
    pair = wide_pair(reconstruction, target, min_size=2)
    if reconstruction.shape[1] not in (1, 3):
        raise ValueError(
            "`reconstruction` must have 3 channels (color) or 1 (gray), got "
            f"{tuple(reconstruction.shape)}."
        )
    ours, theirs = (_gradient_magnitude(image / data_range) for image in pair)
    similarity = (2 * ours * theirs + _C) / (ours.square() + theirs.square() + _C)
    return similarity.flatten(1).std(dim=1, correction=0).float()


def _gradient_magnitude(image: Tensor) -> Tensor:
    """Returns the Prewitt gradient magnitude of the halved luma: ``(b, 1, h // 2, w // 2)``."""
    luma = weighted_sum(image, _LUMA) if image.shape[1] == 3 else image
    step = torch.arange(1, -2, -1, dtype=luma.dtype, device=luma.device) / 3
    filters = torch.stack([step.expand(3, 3), step.expand(3, 3).T]).unsqueeze(1)
    with without_autocast(image.device.type):
        gradient = F.conv2d(F.avg_pool2d(luma, 2), filters, padding=1)
    return gradient.square().sum(dim=1, keepdim=True).sqrt()
