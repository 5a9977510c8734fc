"""Nearest-code search: one operator, whatever computes it."""

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_choice, check_floating, check_last_dim
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._operators import is_traced
from vqprior.functional._kernels._search_blocks import search_blocks

_METRICS = ("euclidean", "cosine", "dot")


def nearest_indices(
    x: Tensor, codes: Tensor, *, metric: str = "euclidean", num_nearest: int = 1
) -> Tensor:
    """Finds the code closest to each vector.

    Equal scores go to the lowest index. Equal codes have equal scores where the product computes
    every column alike, as the kernels for CUDA devices and MKL do; elsewhere where it is exact, and
    otherwise one of them is chosen. Scores are computed in float32 or wider, whatever the dtype of
    the inputs and inside ``torch.autocast`` too, after a shift and a power-of-two scaling that
    keep an offset or a scale common to ``x`` and ``codes`` from costing accuracy. No gradient
    flows. Memory beyond the result is bounded: a block of scores, never all ``n`` x ``k``.
    Vectors with a non-finite feature get an arbitrary valid index. On a CUDA device, one fused
    kernel does it, where Triton is installed, ``num_nearest`` is 1 and nothing is wider than
    float32.

    Args:
        x: Vectors to match.
        codes: Candidates, one a row; several codebooks of one size are searched together.
        metric: ``"euclidean"`` distance, ``"cosine"`` similarity (a zero vector is equally
            similar to all codes) or ``"dot"`` product.
        num_nearest: How many codes to return for each vector, the closest first.

    Returns:
        Indices of rows of ``codes``, as ``int64``.

    Raises:
        TypeError: If ``x`` or ``codes`` is not floating point.
        ValueError: If ``codes`` is empty or has another number of dimensions, the features or
            codebooks differ in number, ``metric`` is unknown, or ``num_nearest`` is not between 1
            and ``k``.

    Shape:
        - ``x``: ``(..., d)``, or ``(..., q, d)`` for ``q`` codebooks
        - ``codes``: ``(k, d)``, or ``(q, k, d)``
        - returns: ``(...)`` or ``(..., q)``, with ``num_nearest`` appended if that is above 1

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

        Leading dimensions are free:

        >>> nearest_indices(torch.zeros(2, 3, 5, 2), codes).shape
        torch.Size([2, 3, 5])

        Each of two halves of a vector in a codebook of its own:

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
            "`codes` must have shape (k, d), or (q, k, d) for q codebooks, with each at least 1, "
            f"got {tuple(codes.shape)}."
        )
    check_last_dim("x", x, codes.shape[-1])
    if codes.ndim == 3 and x.shape[-2:-1] != codes.shape[:1]:
        raise ValueError(
            f"`x` must have shape (..., {codes.shape[0]}, {codes.shape[2]}), a vector for each "
            f"codebook, got {tuple(x.shape)}."
        )


def _search(x: Tensor, codes: Tensor, metric: str, num_nearest: int) -> Tensor:
    """The search, by a kernel or by plain operators: ``(..., [q,] m)``."""
    several = codes.ndim == 3
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        tables = codes.to(dtype) if several else codes.to(dtype).unsqueeze(0)
        prepared = _prepare(tables, metric)
        tokens = x.reshape(-1, len(tables), x.shape[-1]).transpose(0, 1)
        if num_nearest == 1 and _triton.is_usable(x, codes):
            from vqprior.functional._kernels._triton_search import nearest  # needs Triton

            found = nearest(tokens, *(part.contiguous() for part in prepared)).unsqueeze(-1)
        else:
            found = search_blocks(tokens, *prepared, num_nearest)
    return found.transpose(0, 1).contiguous().view(*x.shape[:-1], num_nearest)


_search_op = torch.library.custom_op("vqprior::nearest_indices", _search, mutates_args=())


@_search_op.register_fake
def _(x: Tensor, codes: Tensor, metric: str, num_nearest: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], num_nearest), dtype=torch.int64)


def _prepare(codes: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turns a metric into ``argmin_k bias[k] - 2 <(x - shift) * scale, keys[k]>``.

    ``||x||^2`` is the same for every code, so it cannot change the arg-min and is left out: it
    would only cost precision. Shifting by the mean code does not change distances, and a scale
    that is a power of two multiplies without rounding. For codes ``(q, k, d)``: keys
    ``(q, k, d)``, bias ``(q, k)``, shift ``(q, d)``, scale ``(q,)``.
    """
    shift = torch.zeros_like(codes[:, 0])
    if metric == "euclidean":
        shift = codes.mean(dim=1)
        codes = codes - shift.unsqueeze(1)
    elif metric == "cosine":
        # Rows are scaled first, since the square of a small or large length is not a number.
        rows = codes / codes.abs().amax(dim=2, keepdim=True).clamp_min(
            torch.finfo(codes.dtype).tiny
        )
        codes = torch.nn.functional.normalize(rows, dim=2)
    largest = torch.maximum(codes.amax(dim=(1, 2)), -codes.amin(dim=(1, 2)))
    _, exponent = torch.frexp(largest)
    scale = torch.ldexp(torch.ones_like(largest), -exponent.clamp(-120, 120))
    keys = codes * scale[:, None, None]
    bias = keys.square().sum(dim=2) if metric == "euclidean" else keys.new_zeros(keys.shape[:2])
    return keys, bias, shift, scale
