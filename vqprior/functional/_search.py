"""Nearest-code search, a block of the distance matrix at a time."""

import torch
from torch import Tensor

from vqprior._checks import (
    check_at_least,
    check_choice,
    check_codes,
    check_floating,
    check_last_dim,
)

_METRICS = ("euclidean", "cosine", "dot")
_MAX_BLOCK_CODES = 8192
_MAX_BLOCK_ENTRIES = 1 << 20  # 4 MiB of float32 scores: about what stays in cache
# A token further away than this many times the codes' own scale could overflow a score.
_FAR = 1e30


def nearest_codes(
    x: Tensor, codes: Tensor, *, metric: str = "euclidean", num_nearest: int = 1
) -> Tensor:
    """Finds the code closest to each vector.

    Ties go to the lowest index. Scores are computed in float32 or wider, whatever the dtype of
    the inputs and inside ``torch.autocast`` too, after a shift and a power-of-two scaling that
    keep an offset or a scale common to ``x`` and ``codes`` from costing accuracy. No gradient
    flows. Memory beyond the result is bounded: a block of scores, never all ``n`` x ``k``.
    Vectors with a non-finite feature get an arbitrary valid index.

    Args:
        x: Vectors to match.
        codes: Candidates, one a row.
        metric: ``"euclidean"`` distance, ``"cosine"`` similarity (a zero vector is equally
            similar to all codes) or ``"dot"`` product.
        num_nearest: How many codes to return for each vector, the closest first.

    Returns:
        Indices of rows of ``codes``, as ``int64``.

    Raises:
        TypeError: If ``x`` or ``codes`` is not floating point.
        ValueError: If ``codes`` is not a non-empty matrix, the features differ in number,
            ``metric`` is unknown, or ``num_nearest`` is not between 1 and ``k``.

    Shape:
        - ``x``: ``(..., d)``
        - ``codes``: ``(k, d)``
        - returns: ``(...)``, or ``(..., num_nearest)`` if ``num_nearest`` is above 1

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, equation 1. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior.functional import nearest_codes
        >>> codes = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0]])
        >>> nearest_codes(torch.tensor([[0.9, 0.8], [3.0, 0.1]]), codes)
        tensor([1, 2])
        >>> nearest_codes(torch.tensor([[0.9, 0.8], [3.0, 0.1]]), codes, num_nearest=2)
        tensor([[1, 0],
                [2, 1]])

        Leading dimensions are free:

        >>> nearest_codes(torch.zeros(2, 3, 5, 2), codes).shape
        torch.Size([2, 3, 5])
    """
    check_floating("x", x)
    check_codes("codes", codes)
    check_last_dim("x", x, codes.shape[1])
    check_choice("metric", metric, _METRICS)
    check_at_least("num_nearest", num_nearest, 1)
    if num_nearest > codes.shape[0]:
        raise ValueError(
            f"`num_nearest` must be at most the number of codes, {codes.shape[0]}, "
            f"got {num_nearest}."
        )
    found: Tensor = _nearest_codes(x.detach(), codes.detach(), metric, num_nearest)
    return found.squeeze(-1) if num_nearest == 1 else found


@torch.library.custom_op("vqprior::nearest_codes", mutates_args=())
def _nearest_codes(x: Tensor, codes: Tensor, metric: str, num_nearest: int) -> Tensor:
    """The search as one operator, so that compilers need not look inside."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        keys, bias, shift, scale = _prepare(codes.to(dtype), metric)
        found = torch.empty(flat.shape[0], num_nearest, dtype=torch.int64, device=x.device)
        num_rows = max(1, _MAX_BLOCK_ENTRIES // min(keys.shape[0], _MAX_BLOCK_CODES))
        for start in range(0, flat.shape[0], num_rows):
            block = flat[start : start + num_rows].to(dtype)
            block = ((block - shift) * scale).clamp(-_FAR, _FAR)
            _search_block(block, keys, bias, found[start : start + num_rows])
    return found.reshape(*x.shape[:-1], num_nearest)


@_nearest_codes.register_fake
def _(x: Tensor, codes: Tensor, metric: str, num_nearest: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], num_nearest), dtype=torch.int64)


def _prepare(codes: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turns a metric into ``argmin_k bias[k] - 2 <(x - shift) * scale, keys[k]>``.

    ``||x||^2`` is the same for every code, so it cannot change the arg-min and is left out: it
    would only cost precision. Shifting by the mean code does not change distances, and a scale
    that is a power of two multiplies without rounding.
    """
    shift = codes.new_zeros(codes.shape[1])
    if metric == "euclidean":
        shift = codes.mean(dim=0)
        codes = codes - shift
    elif metric == "cosine":
        # Rows are scaled first, since the square of a small or large length is not a number.
        rows = codes / codes.abs().amax(dim=1, keepdim=True).clamp_min(
            torch.finfo(codes.dtype).tiny
        )
        codes = torch.nn.functional.normalize(rows, dim=1)
    _, exponent = torch.frexp(codes.abs().amax())
    scale = torch.ldexp(torch.ones_like(shift[0]), -exponent.clamp(-120, 120))
    codes = codes * scale
    bias = codes.square().sum(dim=1) if metric == "euclidean" else codes.new_zeros(len(codes))
    return codes, bias, shift, scale


def _search_block(block: Tensor, keys: Tensor, bias: Tensor, found: Tensor) -> None:
    """Writes the nearest keys of each row of ``block`` into ``found`` ``(rows, m)``."""
    best = block.new_full(found.shape, torch.inf)
    found.zero_()
    for start in range(0, keys.shape[0], _MAX_BLOCK_CODES):
        part = slice(start, start + _MAX_BLOCK_CODES)
        scores = torch.addmm(bias[part], block, keys[part].T, alpha=-2.0)
        for place in range(min(found.shape[1], scores.shape[1])):
            value, index = scores.min(dim=1)
            _insert(best, found, value, index + start)
            if place + 1 < found.shape[1]:
                scores.scatter_(1, index.unsqueeze(1), torch.inf)


def _insert(best: Tensor, found: Tensor, value: Tensor, index: Tensor) -> None:
    """Inserts one candidate a row into the sorted lists; an equal one stays behind."""
    closer = torch.zeros_like(value, dtype=torch.bool)
    for place in range(best.shape[1]):
        # From where it goes in, everything moves up by one, equal values too.
        closer = closer | (value < best[:, place])
        best[:, place], value = (
            torch.where(closer, value, best[:, place]),
            torch.where(closer, best[:, place], value),
        )
        found[:, place], index = (
            torch.where(closer, index, found[:, place]),
            torch.where(closer, found[:, place], index),
        )
