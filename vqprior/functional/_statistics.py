"""Per-code sums and counts of assigned vectors."""

from typing import Any

import numpy as np
import numpy.typing as npt
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
from vqprior.functional._kernels._host import is_on_host
from vqprior.functional._kernels._operators import batch_first, is_traced


def code_sums_and_counts(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Sums and counts the vectors assigned to each code.

    Computed in float32 or wider, without a one-hot matrix. Sums and counts share one tensor, so a
    distributed caller needs one collective. On a CUDA device, the last bits of
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
    return torch.cat(sums_and_counts(x, indices, num_codes), dim=1)


def sums_and_counts(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Returns the sums ``(k, d)`` and the counts ``(k, 1)`` of ``code_sums_and_counts``."""
    check_floating("x", x)
    check_integer("indices", indices)
    check_shape("indices", indices, x.shape[:-1])
    check_at_least("num_codes", num_codes, 1)
    check_index_range("indices", indices, num_codes)
    flat_indices = indices.reshape(-1).long()
    flat = x.detach().reshape(flat_indices.shape[0], x.shape[-1])
    if is_on_host(flat, flat_indices) and not _has_kernel(flat, flat_indices):
        return _add_segments(flat, flat_indices, num_codes)
    add_up = _add_up_op if is_traced(flat, flat_indices) else _add_up
    totals: Tensor = add_up(flat, flat_indices, num_codes)
    return totals[:, :-1], totals[:, -1:]


def _add_segments(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sums on a CPU: the vectors of each code are gathered and added up in the order of tokens.

    Bit for bit what ``index_add_`` gives, in a half to a quarter of its time; several threads share
    the codes.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    names = indices.numpy()
    counts = np.bincount(names + 1, minlength=num_codes + 1)
    real = np.float64 if x.dtype == torch.float64 else np.float32
    totals = torch.from_numpy(counts[1:, None].astype(real))
    if x.numel() == 0:
        return x.new_zeros(num_codes, x.shape[1]), totals
    order = torch.from_numpy(_order(names, num_codes)[counts[0] :])  # -1 comes first
    first = torch.from_numpy(counts.cumsum()[:-1] - counts[0])
    sums: Tensor = torch.embedding_bag(x.contiguous(), order, first, False, 0)[0]  # noqa: FBT003
    return sums, totals


def _order(names: npt.NDArray[np.int64], num_codes: int) -> npt.NDArray[np.int64]:
    """Returns what sorts ``names`` stably: 16 bits at a time, which numpy sorts by radix."""
    if num_codes < 1 << 15:
        return names.astype(np.int16).argsort(kind="stable")
    order = names.astype(np.uint16).argsort(kind="stable")
    high = (names >> 16).astype(np.int16)
    return order[high[order].argsort(kind="stable")]


def _has_kernel(x: Tensor, indices: Tensor) -> bool:
    return _triton.is_usable(x, indices) and not torch.are_deterministic_algorithms_enabled()


def _add_up(x: Tensor, indices: Tensor, num_codes: int) -> Tensor:
    """Computes the statistics of ``(n, d)`` and ``(n,)`` by the kernel or by plain operators."""
    if _has_kernel(x, indices):
        # Needs Triton.
        from vqprior.functional._kernels._triton_statistics import add_statistics_, count_tables

        tables = count_tables(len(x), num_codes)
        totals = x.new_zeros(tables, num_codes, x.shape[1] + 1, dtype=torch.float32)
        add_statistics_(totals, x, indices)
        return totals[0] if tables == 1 else totals.sum(dim=0)
    if x.device.type == "cpu":
        return torch.cat(_add_segments(x, indices, num_codes), dim=1)
    # Ignored vectors are added to an extra row: cheaper than a pass over `x` to zero them.
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = indices + 1
    totals = x.new_zeros(num_codes + 1, x.shape[1] + 1, dtype=dtype)
    totals[:, :-1].index_add_(0, rows, x.to(dtype))
    totals[:, -1].index_add_(0, rows, totals.new_ones(1).expand(len(x)))
    return totals[1:]


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
