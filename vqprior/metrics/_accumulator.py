"""Base class of streaming metrics."""

import torch
from torch import Tensor

from vqprior._precision import KeepsDtypes, widest_float


class Accumulator(KeepsDtypes):
    """A streaming metric whose buffers hold sums and keep their dtype under casts."""

    def reset(self) -> None:
        """Sets all sums of this rank to zero."""
        for buffer in self.buffers():
            buffer.zero_()

    @staticmethod
    def _sums(*shape: int) -> Tensor:
        """Returns zeros on the default device, in its widest dtype."""
        return torch.zeros(shape, dtype=widest_float(torch.get_default_device()))
