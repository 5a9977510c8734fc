"""Counter-based random numbers, which need no generator state on the host."""

import numpy as np
import torch
from torch import Tensor

from vqprior.functional._kernels._host import is_on_host


def counter_integer(counter: Tensor) -> Tensor:
    """Returns integers in ``[0, 2**63)``, each a function of its int64 ``counter`` only.

    Uses the SplitMix64 hash (Steele, Lea and Flood, OOPSLA 2014) in wrapping int64 arithmetic,
    which every device has, unlike float64.
    """
    if is_on_host(counter):
        return _hash(counter)
    x = counter * -7046029254386353131
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 1)


def counter_gumbel(counter: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns standard Gumbel noise, a function of ``counter`` only; always finite.

    ``-log(-log1p(-u))`` of uniform numbers ``u``, which are fine near 0: there the noise is large.
    """
    uniform = counter_integer(counter).to(dtype) * 2.0**-63
    uniform = uniform.clamp(2.0**-64, 1 - torch.finfo(dtype).eps / 2)
    return -(-(-uniform).log1p()).log()


def to_gumbel(uniform: Tensor) -> Tensor:
    """Converts uniform numbers in ``[0, 1)`` to standard Gumbel noise; always finite."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def _hash(counter: Tensor) -> Tensor:
    """Computes ``counter_integer`` by numpy, which has unsigned integers."""
    x = np.atleast_1d(counter.numpy()).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    part = x >> np.uint64(30)
    x ^= part
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=part)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=part)
    x >>= np.uint64(1)
    return torch.from_numpy(x.view(np.int64)).view(counter.shape)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts int64 arithmetically, copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
