"""Random numbers from a counter: no generator whose state would live on the host."""

import torch
from torch import Tensor


def counter_uniform(counter: Tensor) -> Tensor:
    """Returns numbers in ``[0, 1)``, float64, each a function of its int64 ``counter`` alone.

    The SplitMix64 hash (Steele, Lea and Flood, OOPSLA 2014), in int64 arithmetic that wraps
    around.
    """
    x = counter * -7046029254386353131
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() / 2**53


def to_gumbel(uniform: Tensor) -> Tensor:
    """Turns uniform numbers in ``[0, 1)`` into standard Gumbel noise, finite everywhere."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts of torch copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
