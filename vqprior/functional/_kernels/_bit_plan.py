"""What the kernels of bits are told."""

import dataclasses

MAX_BITS = 20  # kernels are unrolled: more take long to compile, and spill registers
MAX_GROUP = 10  # a larger table of joint probabilities would not stay in registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPlan:
    """What a call is about: the number of bits, and the options of the quantizer.

    ``factor`` makes log-odds of prepared features. ``weights`` are those of the commitment, the
    entropy of tokens and that of the batch.
    """

    bits: int
    group: int
    scale: float
    factor: float
    weights: tuple[float, float, float]
    sphere: bool

    def halves(self) -> list[tuple[int, int]]:
        """Returns the numbers of bits of the halves of each group."""
        sizes = [min(self.group, self.bits - at) for at in range(0, self.bits, self.group)]
        return [((size + 1) // 2, size // 2) for size in sizes]

    @property
    def has_entropy(self) -> bool:
        """Whether a weight of an entropy is not 0."""
        return self.weights[1] > 0 or self.weights[2] > 0
