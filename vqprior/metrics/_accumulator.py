"""Base class of streaming metrics."""

from vqprior._precision import KeepsDtypes


class Accumulator(KeepsDtypes):
    """A streaming metric whose buffers hold sums and keep their dtype under casts."""

    def reset(self) -> None:
        """Sets all sums of this rank to zero."""
        for buffer in self.buffers():
            buffer.zero_()
