"""Quality of pictures against originals: PSNR, SSIM and GMSD, one number a picture."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_feature_map, check_floating, check_positive, check_shape

_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_LUMA_OFFSET = 16 / 255


def rgb_to_luma(picture: Tensor) -> Tensor:
    """Returns the luma that super-resolution papers measure on.

    ITU-R BT.601 in studio swing: ``(65.481 R + 128.553 G + 24.966 B + 16) / 255``, from 16 / 255
    for black to 235 / 255 for white.

    Args:
        picture: RGB in [0, 1].

    Returns:
        The luma.

    Raises:
        TypeError: If ``picture`` is not floating point.
        ValueError: If it has not three channels.

    Shape:
        - ``picture``: ``(b, 3, h, w)``
        - returns: ``(b, 1, h, w)``

    References:
        ITU-R Recommendation BT.601.

    Examples:
        >>> import torch
        >>> from vqprior.metrics import rgb_to_luma
        >>> 255 * rgb_to_luma(torch.ones(1, 3, 1, 1))
        tensor([[[[235.]]]])
    """
    check_feature_map("picture", picture, 3)
    weights = picture.new_tensor(_LUMA).view(3, 1, 1)
    return (picture * weights).sum(dim=1, keepdim=True) + _LUMA_OFFSET


def psnr(picture: Tensor, original: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Returns the peak signal-to-noise ratio of each picture, in dB; infinite if equal.

    Args:
        picture: Pictures.
        original: What they should be.
        data_range: Distance between black and white.

    Returns:
        ``10 log10(data_range^2 / mse)``, one for each picture.

    Raises:
        TypeError: If the pictures are not floating point.
        ValueError: If the shapes differ or ``data_range`` is not greater than 0.

    Shape:
        - ``picture``, ``original``: ``(b, c, h, w)``
        - returns: ``(b,)``

    Examples:
        >>> import torch
        >>> from vqprior.metrics import psnr
        >>> psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5))
        tensor([20.0000])
    """
    _check_pair(picture, original, data_range)
    error = (picture.float() - original.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(picture: Tensor, original: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Returns the structural similarity of each picture, 1 if equal.

    Gaussian window of 11 pixels and standard deviation 1.5, ``K1 = 0.01``, ``K2 = 0.03``, over
    windows that lie inside the picture; the mean over channels.

    Args:
        picture: Pictures.
        original: What they should be.
        data_range: Distance between black and white.

    Returns:
        One number for each picture, at most 1.

    Raises:
        TypeError: If the pictures are not floating point.
        ValueError: If the shapes differ, a side is under 11 pixels, or ``data_range`` is not
            greater than 0.

    Shape:
        - ``picture``, ``original``: ``(b, c, h, w)``
        - returns: ``(b,)``

    References:
        Wang, Bovik, Sheikh and Simoncelli, *Image Quality Assessment: From Error Visibility to
        Structural Similarity*, IEEE TIP 2004, equation 13.

    Examples:
        >>> import torch
        >>> from vqprior.metrics import ssim
        >>> picture = torch.rand(1, 3, 16, 16)
        >>> ssim(picture, picture)
        tensor([1.])
    """
    _check_pair(picture, original, data_range)
    check_feature_map("picture", picture, picture.shape[1], min_size=11)
    # In float64: variances are differences of nearly equal numbers.
    x, y = picture.double().flatten(0, 1)[:, None], original.double().flatten(0, 1)[:, None]
    position = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    window = torch.exp(-position.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(maps: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(maps, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x.square()
    variance_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (
        (2 * mean_x * mean_y + c1)
        * (2 * covariance + c2)
        / ((mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2))
    )
    return similarity.flatten(1).mean(dim=1).view(len(picture), -1).mean(dim=1).float()


def gmsd(picture: Tensor, original: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Returns the gradient magnitude similarity deviation of each picture, 0 if equal.

    Lower is better. A perceptual measure without learned weights: how unevenly the gradients of
    the luma, at half the resolution, differ from those of the original.

    Args:
        picture: RGB pictures.
        original: What they should be.
        data_range: Distance between black and white.

    Returns:
        One number for each picture, at least 0.

    Raises:
        TypeError: If the pictures are not floating point.
        ValueError: If the shapes differ, there are not three channels, a side is under 6 pixels,
            or ``data_range`` is not greater than 0.

    Shape:
        - ``picture``, ``original``: ``(b, 3, h, w)``
        - returns: ``(b,)``

    References:
        Xue, Zhang, Mou and Bovik, *Gradient Magnitude Similarity Deviation: A Highly Efficient
        Perceptual Image Quality Index*, IEEE TIP 2014, equations 4 to 6, with the constant 170
        for 8-bit levels. <https://arxiv.org/abs/1308.3052>

    Examples:
        >>> import torch
        >>> from vqprior.metrics import gmsd
        >>> picture = torch.rand(1, 3, 16, 16)
        >>> gmsd(picture, picture)
        tensor([0.])
    """
    _check_pair(picture, original, data_range)
    check_feature_map("picture", picture, 3, min_size=6)
    luma = picture.new_tensor((0.299, 0.587, 0.114), dtype=torch.float64).view(3, 1, 1)
    prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=torch.float64, device=luma.device) / 3

    def gradient(pictures: Tensor) -> Tensor:
        gray = (pictures.double() / data_range * luma).sum(dim=1, keepdim=True)
        half = F.avg_pool2d(gray, 2)
        across = F.conv2d(half, prewitt.view(1, 1, 3, 3))
        down = F.conv2d(half, prewitt.T.reshape(1, 1, 3, 3))
        return (across.square() + down.square()).sqrt()

    constant = 170 / 255**2
    a, b = gradient(picture), gradient(original)
    similarity = (2 * a * b + constant) / (a.square() + b.square() + constant)
    return similarity.flatten(1).std(dim=1, correction=0).float()


def _check_pair(picture: Tensor, original: Tensor, data_range: float) -> None:
    check_floating("picture", picture)
    check_floating("original", original)
    check_feature_map("picture", picture, picture.shape[1] if picture.ndim > 1 else 3)
    check_shape("original", original, picture.shape)
    check_positive("data_range", data_range)
