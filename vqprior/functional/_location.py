"""Where the codes of a codebook lie, for arithmetic that a few odd codes must not disturb."""

import torch
from torch import Tensor

# The median of so many codes, evenly spaced over the codebook, stays where most codes are while
# less than half of them are odd, and its cost does not grow with the codebook.
SAMPLE = 32
_EXPONENT_BITS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def sizes_of(codes: Tensor) -> Tensor:
    """Returns the largest absolute feature of each code, ``(..., k, d) -> (..., k)``.

    It is below infinity for finite codes alone.
    """
    return codes.abs().amax(dim=-1)


def finite_codes(codes: Tensor) -> Tensor:
    """Returns the codes ``(..., k, d)`` with zeros for those that are not finite."""
    return torch.where((sizes_of(codes) < torch.inf).unsqueeze(-1), codes, 0.0)


def find_center(codes: Tensor) -> Tensor:
    """Returns what to subtract before distances are computed: ``(..., k, d) -> (..., d)``.

    Products of vectors that share a large offset lose the digits that tell the vectors apart. The
    center is the median of each feature, or 0 where the median is not further from 0 than the
    quartiles are apart. Then vectors near it lose nothing by the subtraction, so that equal
    distances stay equal, and vectors around 0 are left as they are.
    """
    ordered = codes.detach()[..., :: step_of(codes.shape[-2]), :].sort(dim=-2).values
    size = ordered.shape[-2]
    median = ordered[..., size // 2, :]
    spread = ordered[..., 3 * size // 4, :] - ordered[..., size // 4, :]
    return torch.where(median.abs() > spread, median, 0.0)


def find_scale(sizes: Tensor) -> Tensor:
    """Returns a power of two that brings codes of ``sizes`` to about 1: ``(..., k) -> (...)``.

    It is that of the median size, in float32 or float64; zeros and what is not finite count as 1.
    """
    some = sizes[..., :: step_of(sizes.shape[-1])]
    some = torch.where((some > 0) & (some < torch.inf), some, 1.0).sort(dim=-1).values
    median = some[..., some.shape[-1] // 2].clamp(2.0**-100, 2.0**100)
    # By the bits of the exponent, since not every device has `frexp`.
    integer, bits = _EXPONENT_BITS[sizes.dtype]
    return 1 / (median.view(integer) & bits).view(sizes.dtype)


def step_of(num_codes: int) -> int:
    """Returns the distance of sampled codes."""
    return -(-num_codes // SAMPLE)
