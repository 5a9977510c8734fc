"""What streaming metrics share: exact sums that survive casts, and means over images."""

import abc

import torch
from torch import Tensor

from vqprior._checks import check_floating, check_shape
from vqprior._distributed import all_reduce_sum_
from vqprior._precision import KeepsDtypes


class Accumulator(KeepsDtypes):
    """Holds sums in buffers that keep their dtype, whatever the module is cast to."""

    def reset(self) -> None:
        """Forgets everything that was counted on this rank."""
        for buffer in self.buffers():
            buffer.zero_()


class ImageMean(Accumulator, abc.ABC):
    """The mean of a score over all images of all ranks."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @abc.abstractmethod
    def _scores(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Returns the score of each image, ``(b,)``."""

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
        scores = self._scores(reconstruction, target)
        self.total += scores.double().sum()
        self.count += scores.numel()

    def compute(self) -> float:
        """Returns the mean over all images since ``reset``, NaN if there was none.

        Every rank must call, and gets the same value; what each rank counted stays as it is.
        """
        total, count = all_reduce_sum_(torch.stack([self.total, self.count.double()])).tolist()
        return total / count if count else float("nan")
