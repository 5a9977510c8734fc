"""Per-code sums and counts of assigned vectors."""

from typing import Any

import torch
from torch import Tensor

from vqprior._checks import (
    check_at_least,
    check_floating,
    check_index_range,
    check_integer,
    check_shape,
)
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._operators import batch_first, is_traced


def code_sums_and_counts(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Sums and counts the vectors assigned to each code.

    Computed by scatter-add in float32 or wider, without a one-hot matrix. Sums and counts share
    one tensor, so a distributed caller needs one collective. On a CUDA device, the last bits of
    the sums differ between calls, unless ``torch.use_deterministic_algorithms`` is on.

    Args:
        x: Vectors; ``d`` may be 0, to count only.
        indices: The index of each vector's code; vectors with -1 are ignored.
        num_codes: Number of codes ``k``, at least 1.

    Returns:
        Sums in the first ``d`` columns, counts in the last one.

    Raises:
        TypeError: If ``x`` is not floating point or ``indices`` is not an integer tensor.
        ValueError: If ``indices`` does not have the shape of the tokens, an index on the CPU is
            out of range, or ``num_codes`` is below 1.

    Shape:
        - ``x``: ``(..., d)``
        - ``indices``: ``(...)``
        - returns: ``(k, d + 1)``

    Examples:
        >>> import torch
        >>> from vqprior.functional import code_sums_and_counts
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> code_sums_and_counts(x, torch.tensor([1, 1, -1]), num_codes=2)
        tensor([[0., 0., 0.],
                [4., 6., 2.]])
    """
    check_floating("x", x)
    check_integer("indices", indices)
    check_shape("indices", indices, x.shape[:-1])
    check_at_least("num_codes", num_codes, 1)
    check_index_range("indices", indices, num_codes)
    flat_indices = indices.reshape(-1).long()
    flat = x.detach().reshape(flat_indices.shape[0], x.shape[-1])
    add_up = _add_up_op if is_traced(flat, flat_indices) else _add_up
    totals: Tensor = add_up(flat, flat_indices, num_codes)
    return totals


def _add_up(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Computes the statistics of ``(n, d)`` and ``(n,)`` by the kernel or by plain operators."""
    if _triton.is_usable(x, indices) and not torch.are_deterministic_algorithms_enabled():
        from vqprior.functional._kernels._triton_statistics import add_statistics_  # needs Triton

        totals = x.new_zeros(num_codes, x.shape[1] + 1, dtype=torch.float32)
        add_statistics_(totals, x, indices)
        return totals
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Ignored vectors are added to an extra row: cheaper than a pass over `x` to zero them.
    indices = torch.where(indices >= 0, indices, num_codes)
    sums = x.new_zeros(num_codes + 1, x.shape[1], dtype=dtype)
    sums.index_add_(0, indices, x.to(dtype))
    counts = x.new_zeros(num_codes + 1, 1, dtype=dtype)
    counts.index_add_(0, indices, counts.new_ones(1, 1).expand(len(x), 1))
    return torch.cat([sums[:-1], counts[:-1]], dim=1)


_add_up_op = torch.library.custom_op("vqprior::code_sums_and_counts", _add_up, mutates_args=())


@_add_up_op.register_fake
def _(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(num_codes, x.shape[1] + 1, dtype=dtype)


@_add_up_op.register_vmap
def _(
    info: Any,  # noqa: ANN401
    in_dims: tuple[int | None, ...],
    x: Tensor,
    indices: Tensor,
    num_codes: int,
) -> tuple[Tensor, int]:
    """Every sample gets rows of its own in one table."""
    size = info.batch_size
    x, indices = batch_first(x, in_dims[0], size), batch_first(indices, in_dims[1], size)
    first = num_codes * torch.arange(size, device=indices.device).unsqueeze(1)
    rows = torch.where(indices >= 0, indices + first, -1)
    totals: Tensor = _add_up_op(x.flatten(0, 1), rows.flatten(), size * num_codes)
    return totals.unflatten(0, (size, num_codes)), 0
