"""Counts and sums of the tokens that chose each code."""

import torch
from torch import Tensor

from vqprior._checks import (
    check_at_least,
    check_floating,
    check_index_range,
    check_integer,
    check_shape,
)


def code_statistics(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Sums, for each code, the vectors that chose it, and counts them.

    Computed by scatter-add in float32 or wider, without a one-hot matrix. Sums and counts
    share one tensor, so that a distributed caller needs one collective.

    Args:
        x: Vectors; ``d`` may be 0, to count only.
        indices: The code of each vector; -1 leaves a vector out, whatever it holds.
        num_codes: Number of codes ``k``.

    Returns:
        Sums in the first ``d`` columns, counts in the last.

    Raises:
        TypeError: If ``x`` is not floating point or ``indices`` not an integer tensor.
        ValueError: If ``indices`` has another shape than the tokens, an index on the CPU names no
            code, or ``num_codes`` is below 1.

    Shape:
        - ``x``: ``(..., d)``
        - ``indices``: ``(...)``
        - returns: ``(k, d + 1)``

    Examples:
        >>> import torch
        >>> from vqprior.functional import code_statistics
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> code_statistics(x, torch.tensor([1, 1, -1]), num_codes=2)
        tensor([[0., 0., 0.],
                [4., 6., 2.]])
    """
    check_floating("x", x)
    check_integer("indices", indices)
    check_shape("indices", indices, x.shape[:-1])
    check_at_least("num_codes", num_codes, 1)
    check_index_range("indices", indices, num_codes)
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat_indices = indices.reshape(-1).long()
    flat = x.detach().reshape(flat_indices.shape[0], x.shape[-1]).to(dtype)
    counted = (flat_indices >= 0).unsqueeze(1)
    rows = torch.cat([flat, flat.new_ones(flat.shape[0], 1)], dim=1)
    rows = torch.where(counted, rows, 0.0)
    totals = flat.new_zeros(num_codes, rows.shape[1])
    return totals.index_add_(0, flat_indices.clamp_min(0), rows)
