"""Streaming mean of an image score."""

from typing import Protocol, final

import torch
from torch import Tensor

from vqprior._checks import (
    check_at_least,
    check_callable,
    check_choice,
    check_feature_map,
    check_floating,
    check_positive,
    check_shape,
)
from vqprior._distributed import all_reduce_sum_
from vqprior.metrics._accumulator import Accumulator
from vqprior.metrics._images import rgb_to_luma


class Score(Protocol):
    """Interface of an image score such as ``psnr``: ``(reconstruction, target) -> (b,)``."""

    def __call__(self, reconstruction: Tensor, target: Tensor, *, data_range: float) -> Tensor: ...


@final
class StreamingMean(Accumulator):
    """Averages an image score, such as ``psnr``, over all images of all batches and ranks.

    ``update(reconstruction, target)`` adds a batch, ``compute()`` returns the mean over all ranks,
    and ``reset()`` starts over. Sums are float64 (float32 on Apple GPUs). The mean PSNR is infinite
    if one pair of images is equal.

    Args:
        score: ``psnr``, ``ssim``, ``gmsd`` or a function with the same signature.
        color: ``"rgb"`` compares the channels as they are; ``"y"`` compares the luma
            (``rgb_to_luma``) of RGB images.
        data_range: Difference between white and black, greater than 0.
        border: Number of pixels to crop from each side first, at least 0. Papers on upscaling crop
            as many pixels as the scale factor.

    Raises:
        TypeError: If ``score`` is not callable.
        ValueError: If an argument is out of range.

    Shape:
        - ``reconstruction``, ``target``: ``(b, c, h, w)``

    Examples:
        >>> import torch
        >>> from vqprior.metrics import StreamingMean, psnr
        >>> metric = StreamingMean(psnr, border=1)
        >>> metric.update(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1))
        >>> metric.update(torch.zeros(1, 3, 9, 9), torch.full((1, 3, 9, 9), 0.01))
        >>> round(metric.compute(), 4)
        30.0
    """

    total: Tensor
    count: Tensor

    def __init__(
        self, score: Score, *, color: str = "rgb", data_range: float = 1.0, border: int = 0
    ) -> None:
        super().__init__()
        check_callable("score", score, "Pass a function such as `psnr`.")
        check_choice("color", color, ("rgb", "y"))
        check_positive("data_range", data_range)
        check_at_least("border", border, 0)
        self.score = score
        self.color = color
        self.data_range = data_range
        self.border = border
        self.register_buffer("total", self._sums())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Shows the constructor's arguments in ``repr``."""
        name = getattr(self.score, "__name__", type(self.score).__name__)
        return f"{name}, color={self.color!r}, data_range={self.data_range}, border={self.border}"

    @torch.no_grad()
    def update(self, reconstruction: Tensor, target: Tensor) -> None:
        """Adds the images of one batch, without synchronizing the device.

        Raises:
            TypeError: If an image is not floating point.
            ValueError: If the shapes differ or are not valid for the score.
        """
        check_floating("reconstruction", reconstruction)
        check_floating("target", target)
        check_shape("target", target, reconstruction.shape)
        scores = self.score(
            self._inner(reconstruction), self._inner(target), data_range=self.data_range
        )
        self.total += scores.to(self.total.dtype).sum()
        self.count += scores.numel()

    def compute(self) -> float:
        """Returns the mean over all images since ``reset``, NaN without any.

        Every rank must call and gets the same value; the state does not change.
        """
        both = torch.stack([self.total, self.count.to(self.total.dtype)])
        total, count = all_reduce_sum_(both).tolist()
        return total / count if count else float("nan")

    def _inner(self, image: Tensor) -> Tensor:
        """Crops the border and converts to luma if requested."""
        channels = 3 if self.color == "y" else None
        check_feature_map("reconstruction", image, channels, min_size=2 * self.border + 1)
        height, width = image.shape[2:]
        inner = image[:, :, self.border : height - self.border, self.border : width - self.border]
        if self.color == "rgb":
            return inner
        return rgb_to_luma(inner / self.data_range) * self.data_range
