"""Counter-based random numbers, which need no generator state on the host."""

import torch
from torch import Tensor


def counter_uniform(counter: Tensor) -> Tensor:
    """Returns float64 numbers in ``[0, 1)``, each a function of its int64 ``counter`` only.

    Uses the SplitMix64 hash (Steele, Lea and Flood, OOPSLA 2014) in wrapping int64 arithmetic.
    """
    x = counter * -7046029254386353131
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() / 2**53


def to_gumbel(uniform: Tensor) -> Tensor:
    """Converts uniform numbers in ``[0, 1)`` to standard Gumbel noise; always finite."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts int64 arithmetically, copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
