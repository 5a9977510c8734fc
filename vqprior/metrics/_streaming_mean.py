"""The mean of a score over images, batch by batch."""

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
    """A function such as ``psnr``: ``(reconstruction, target) -> (b,)``."""

    def __call__(self, reconstruction: Tensor, target: Tensor, *, data_range: float) -> Tensor: ...


@final
class StreamingMean(Accumulator):
    """Mean of a score of single images, such as ``psnr``, over all batches and all ranks.

    ``update(reconstruction, target)`` counts a batch, ``compute()`` gives the mean over all
    images of all ranks, ``reset()`` starts again. Sums are float64. That of ``psnr`` is infinite if
    one pair is equal.

    Args:
        score: ``psnr``, ``ssim``, ``gmsd`` or a function like these.
        color: ``"rgb"`` compares the channels as they are; ``"y"`` compares the luma
            (``rgb_to_luma``) of three.
        data_range: Difference between white and black, greater than 0.
        border: Number of pixels that are cut off each side first, at least 0. Papers on upscaling
            cut as many as the scale factor.

    Raises:
        TypeError: If ``score`` cannot be called.
        ValueError: If an argument is outside its range.

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
        check_callable("score", score, "For example `psnr`.")
        check_choice("color", color, ("rgb", "y"))
        check_positive("data_range", data_range)
        check_at_least("border", border, 0)
        self.score = score
        self.color = color
        self.data_range = data_range
        self.border = border
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Shows the constructor's arguments in ``repr``."""
        name = getattr(self.score, "__name__", type(self.score).__name__)
        return f"{name}, color={self.color!r}, data_range={self.data_range}, border={self.border}"

    @torch.no_grad()
    def update(self, reconstruction: Tensor, target: Tensor) -> None:
        """Counts the images of one batch; nothing is read back to the host.

        Raises:
            TypeError: If an image is not floating point.
            ValueError: If the two shapes differ, or are not what the score can compare.
        """
        check_floating("reconstruction", reconstruction)
        check_floating("target", target)
        check_shape("target", target, reconstruction.shape)
        scores = self.score(
            self._inner(reconstruction), self._inner(target), data_range=self.data_range
        )
        self.total += scores.double().sum()
        self.count += scores.numel()

    def compute(self) -> float:
        """Returns the mean over all images since ``reset``, NaN if there was none.

        Every rank must call, and gets the same value; what each rank counted stays as it is.
        """
        total, count = all_reduce_sum_(torch.stack([self.total, self.count.double()])).tolist()
        return total / count if count else float("nan")

    def _inner(self, image: Tensor) -> Tensor:
        """Cuts the border off, and takes the luma if asked."""
        channels = 3 if self.color == "y" else None
        check_feature_map("reconstruction", image, channels, min_size=2 * self.border + 1)
        height, width = image.shape[2:]
        inner = image[:, :, self.border : height - self.border, self.border : width - self.border]
        if self.color == "rgb":
            return inner
        return rgb_to_luma(inner / self.data_range) * self.data_range
