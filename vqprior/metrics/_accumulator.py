"""What streaming metrics share: exact sums that survive casts."""

from vqprior._precision import KeepsDtypes


class Accumulator(KeepsDtypes):
    """Holds sums in buffers that keep their dtype, whatever the module is cast to."""

    def reset(self) -> None:
        """Forgets everything that was counted on this rank."""
        for buffer in self.buffers():
            buffer.zero_()
