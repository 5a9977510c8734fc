"""What papers on upscaling measure of an image: its luma, without its border."""

import abc

import torch
from torch import Tensor

from vqprior._checks import (
    check_at_least,
    check_choice,
    check_feature_map,
    check_floating,
    check_positive,
    check_shape,
)
from vqprior.metrics._accumulator import ImageMean

_COEFFICIENTS = (65.481, 128.553, 24.966)
_OFFSET = 16.0


def rgb_to_luma(image: Tensor) -> Tensor:
    """Returns the luma of ITU-R BT.601 in studio swing: black is 16/255, white is 235/255.

    ``Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255``, which is what MATLAB's ``rgb2ycbcr``
    gives before rounding, and what PSNR and SSIM "on the Y channel" mean in papers on upscaling.

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
    """Adds the three channels of an image: ``(b, 3, h, w) -> (b, 1, h, w)``."""
    red, green, blue = image[:, :1], image[:, 1:2], image[:, 2:]
    return weights[0] * red + weights[1] * green + weights[2] * blue


def wide_pair(reconstruction: Tensor, target: Tensor, *, min_size: int) -> tuple[Tensor, Tensor]:
    """Checks two batches of images, and returns them in float64."""
    check_feature_map("reconstruction", reconstruction, None, min_size=min_size)
    check_floating("target", target)
    check_shape("target", target, reconstruction.shape)
    return reconstruction.double(), target.double()


class InnerMean(ImageMean):
    """The mean of a score of the inner part of images, in color or of their luma."""

    def __init__(self, *, color: str = "rgb", data_range: float = 1.0, border: int = 0) -> None:
        super().__init__()
        check_choice("color", color, ("rgb", "y"))
        check_positive("data_range", data_range)
        check_at_least("border", border, 0)
        self.color = color
        self.data_range = data_range
        self.border = border

    def extra_repr(self) -> str:
        """Shows the constructor's arguments in ``repr``."""
        return f"color={self.color!r}, data_range={self.data_range}, border={self.border}"

    def _scores(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Scores what is left of the images."""
        return self._inner_scores(self._inner(reconstruction), self._inner(target))

    @abc.abstractmethod
    def _inner_scores(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Returns the score of each image, ``(b,)``, without border, in the right color."""

    def _inner(self, image: Tensor) -> Tensor:
        """Cuts the border off, and takes the luma if asked."""
        channels = 3 if self.color == "y" else None
        check_feature_map("reconstruction", image, channels, min_size=2 * self.border + 1)
        height, width = image.shape[2:]
        inner = image[:, :, self.border : height - self.border, self.border : width - self.border]
        if self.color == "rgb":
            return inner
        return rgb_to_luma(inner / self.data_range) * self.data_range
