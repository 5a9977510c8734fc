"""Nearest-code search."""

from typing import Any

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_choice, check_floating, check_last_dim
from vqprior._precision import without_autocast
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._operators import batch_first, is_traced
from vqprior.functional._kernels._search_blocks import search_blocks
from vqprior.functional._kernels._usual import search_usual
from vqprior.functional._location import find_center, find_scale, sizes_of
from vqprior.functional._unit import to_unit_length

_METRICS = ("euclidean", "cosine", "dot")
_WIDE = (torch.float32, torch.float64)
# Vectors are clamped once they are scaled. For unit codes, this leaves the direction of nearly
# every vector that float32 can hold.
_SCALE_OF_UNIT_CODES = 2.0**-14
# Beyond this multiple of the usual code's size, squares and products could overflow.
_FAR = 2.0**40


def nearest_indices(
    x: Tensor, codes: Tensor, *, metric: str = "euclidean", num_nearest: int = 1
) -> Tensor:
    """Finds the nearest code of each vector.

    Scores are computed in float32 or wider, also under ``torch.autocast``. Vectors and codes are
    shifted and scaled first, so a large offset or scale that most codes share costs no precision,
    whatever the others are. Ties go to the lowest index. Duplicate codes tie if the matrix product
    computes every column alike, as the CUDA kernel and MKL do, or is exact; otherwise any of them
    may be chosen. Vectors with a non-finite feature get an arbitrary valid index; codes with a
    non-finite feature are chosen only if there is no other.

    The full ``n`` x ``k`` matrix of scores is never stored, only a block of bounded size. On a CUDA
    device with Triton, one fused kernel computes the result if ``num_nearest`` is 1 and no input
    is float64. No gradient flows.

    Args:
        x: Vectors to match.
        codes: Codebook, one code per row; several codebooks of one size are searched together.
        metric: ``"euclidean"`` distance, ``"cosine"`` similarity (a zero vector is equally
            similar to all codes) or ``"dot"`` product.
        num_nearest: Number of codes to return per vector, nearest first, in ``[1, k]``.

    Returns:
        Indices of rows of ``codes``, as ``int64``.

    Raises:
        TypeError: If ``x`` or ``codes`` is not floating point.
        ValueError: If ``codes`` is empty or does not have 2 or 3 dimensions, ``x`` does not match
            it, ``metric`` is unknown, or ``num_nearest`` is not in ``[1, k]``.

    Shape:
        - ``x``: ``(..., d)``, or ``(..., q, d)`` for ``q`` codebooks
        - ``codes``: ``(k, d)``, or ``(q, k, d)``
        - returns: ``(...)`` or ``(..., q)``, with a last dimension of ``num_nearest`` if above 1

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, equation 1. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior.functional import nearest_indices
        >>> codes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
        >>> nearest_indices(torch.tensor([[0.9, 0.8], [3.0, 0.1]]), codes)
        tensor([1, 2])
        >>> nearest_indices(torch.tensor([[0.9, 0.8], [3.0, 0.1]]), codes, num_nearest=2)
        tensor([[1, 0],
                [2, 1]])

        Any leading dimensions:

        >>> nearest_indices(torch.zeros(2, 3, 5, 2), codes).shape
        torch.Size([2, 3, 5])

        Two codebooks, one for each half of a vector:

        >>> halves = torch.tensor([[[0.9, 0.8], [3.0, 0.1]]])
        >>> nearest_indices(halves, torch.stack([codes, codes.flip(0)]))
        tensor([[1, 0]])
    """
    check_floating("x", x)
    _check_tables(x, codes)
    check_choice("metric", metric, _METRICS)
    check_at_least("num_nearest", num_nearest, 1)
    if num_nearest > codes.shape[-2]:
        raise ValueError(
            f"`num_nearest` must be at most the number of codes, {codes.shape[-2]}, "
            f"got {num_nearest}."
        )
    x, codes = x.detach(), codes.detach()
    search = _search_op if is_traced(x, codes) else _search
    found: Tensor = search(x, codes, metric, num_nearest)
    return found.squeeze(-1) if num_nearest == 1 else found


def _check_tables(x: Tensor, codes: Tensor) -> None:
    check_floating("codes", codes)
    if codes.ndim not in (2, 3) or codes.numel() == 0:
        raise ValueError(
            "`codes` must have shape (k, d), or (q, k, d) for q codebooks, with sizes at least 1, "
            f"got {tuple(codes.shape)}."
        )
    check_last_dim("x", x, codes.shape[-1])
    if codes.ndim == 3 and x.shape[-2:-1] != codes.shape[:1]:
        raise ValueError(
            f"`x` must have shape (..., {codes.shape[0]}, {codes.shape[2]}), one vector for each "
            f"codebook, got {tuple(x.shape)}."
        )


def _search(x: Tensor, codes: Tensor, metric: str, num_nearest: int) -> Tensor:
    """Searches by the Triton kernel or by plain operators; returns ``(..., [q,] m)``."""
    several = codes.ndim == 3
    if num_nearest == 1 and _triton.is_usable(x, codes):
        return _search_by_kernel(x, codes if several else codes.unsqueeze(0), metric).unsqueeze(-1)
    if num_nearest == 1 and not several and x.is_cpu and x.dtype == codes.dtype in _WIDE:
        usual = search_usual(x.reshape(-1, x.shape[-1]), codes, metric)
        if usual is not None:
            return usual.view(*x.shape[:-1], 1)
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    with without_autocast(x.device.type):
        tables = codes.to(dtype) if several else codes.to(dtype).unsqueeze(0)
        prepared = _prepare(tables, metric)
        tokens = x.reshape(-1, len(tables), x.shape[-1]).transpose(0, 1)
        found = search_blocks(tokens, *prepared, num_nearest)
    return found.transpose(0, 1).contiguous().view(*x.shape[:-1], num_nearest)


def _search_by_kernel(x: Tensor, tables: Tensor, metric: str) -> Tensor:
    from vqprior.functional._kernels._triton_search import nearest_codes  # needs Triton

    scale = None
    if metric == "cosine":
        with without_autocast(x.device.type):
            tables, scale = to_unit_length(tables.float()), _SCALE_OF_UNIT_CODES
    tokens = x.reshape(-1, len(tables), x.shape[-1]).transpose(0, 1)
    found = nearest_codes(tokens, tables, euclidean=metric == "euclidean", scale=scale)
    return found.T.contiguous().view(x.shape[:-1])


_search_op = torch.library.custom_op("vqprior::nearest_indices", _search, mutates_args=())


@_search_op.register_fake
def _(x: Tensor, codes: Tensor, metric: str, num_nearest: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], num_nearest), dtype=torch.int64)


@_search_op.register_vmap
def _(
    info: Any,  # noqa: ANN401
    in_dims: tuple[int | None, ...],
    x: Tensor,
    codes: Tensor,
    metric: str,
    num_nearest: int,
) -> tuple[Tensor, int]:
    """Batched vectors are more vectors, batched codes are more codebooks: still one search."""
    x = batch_first(x, in_dims[0], info.batch_size)
    if in_dims[1] is None:
        return _search_op(x, codes, metric, num_nearest), 0
    codes = codes.movedim(in_dims[1], 0)
    place = x.ndim - codes.ndim + 1  # of the batch, before the codebooks
    tables, vectors = codes.flatten(0, -3), x.movedim(0, place).flatten(place, -2)
    found: Tensor = _search_op(vectors, tables, metric, num_nearest)
    return found.unflatten(place, codes.shape[:-2]), place


def _prepare(codes: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expresses a metric as ``argmin_k bias[k] - 2 <(x - shift) * scale, keys[k]>``.

    ``||x||^2`` is the same for every code and would only cost precision, so it is left out.
    Shifting by a center does not change distances, and scaling by a power of two does not round.
    A code that is not finite gets an infinite bias. For codes ``(q, k, d)`` returns keys
    ``(q, k, d)``, bias ``(q, k)``, shift ``(q, d)`` and scale ``(q,)``.
    """
    sizes = sizes_of(codes)
    shift = torch.zeros_like(codes[:, 0])
    scale = torch.full_like(codes[:, 0, 0], _SCALE_OF_UNIT_CODES)
    if metric == "cosine":
        keys = to_unit_length(codes)
    else:
        if metric == "euclidean":
            shift = find_center(codes)
            codes = codes - shift.unsqueeze(1)
        scale = find_scale(sizes)
        keys = codes * scale[:, None, None]
    keys.clamp_(-_FAR, _FAR).nan_to_num_(0.0)
    bias = keys.square().sum(dim=2) if metric == "euclidean" else keys.new_zeros(keys.shape[:2])
    return keys, torch.where(sizes < torch.inf, bias, torch.inf), shift, scale
