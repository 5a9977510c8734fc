"""Surrogate gradients of a code choice with respect to its logits, by blocks of rows."""

import torch
from torch import Tensor

from vqprior._transforms import is_transforming

_MAX_BLOCK_ENTRIES = 1 << 20  # 4 MiB of float32: a few blocks stay in the cache
# On a GPU each block costs kernel launches, and 64 MiB always fit.
_MAX_BLOCK_ENTRIES_OF_GPUS = 1 << 24
_MIN_BLOCK_ROWS = 32  # products with fewer rows are slow


def row_blocks(n: int, k: int, device: torch.device) -> list[slice]:
    """Splits ``n`` rows of ``k`` numbers into blocks of bounded size.

    Inside ``torch.func`` all rows are one block: blocks are written into a tensor made for all of
    them, which ``vmap`` cannot follow.
    """
    if is_transforming():
        return [slice(0, n)]
    most = _MAX_BLOCK_ENTRIES if device.type == "cpu" else _MAX_BLOCK_ENTRIES_OF_GPUS
    rows = max(_MIN_BLOCK_ROWS, most // k)
    return [slice(start, min(start + rows, n)) for start in range(0, max(n, 1), rows)]


def room_for(blocks: list[slice], *shape: int, like: Tensor) -> Tensor:
    """Returns an empty tensor for the results of all blocks; a single block needs no room."""
    return like.new_empty(shape if len(blocks) > 1 else 0)


def write_rows(into: Tensor, part: slice, rows: Tensor) -> Tensor:
    """Writes the rows of one block, and returns where all are: a single block stays as it is."""
    if into.numel() == 0:
        return rows
    into[part] = rows
    return into


def softmax_gradient(
    logits: Tensor,
    probabilities: Tensor,
    chosen: Tensor,
    wanted: Tensor,
    temperature: float,
    estimator: str,
) -> Tensor:
    """Computes the gradient of logits ``(n, k)``; ``wanted`` is that of the probabilities."""
    if estimator == "reinmax":
        return _reinmax_backward(logits, probabilities, chosen, wanted)
    gradient = _softmax_backward(probabilities, wanted)
    return gradient if _is_one(temperature) else gradient.div_(temperature)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Returns ``softmax(logits / temperature)``."""
    scaled = logits if _is_one(temperature) else logits / temperature
    return scaled.softmax(dim=-1)


def _is_one(temperature: float) -> bool:
    """Whether a division by the temperature would only cost time."""
    return isinstance(temperature, (int, float)) and temperature == 1


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """Applies the Jacobian ``diag(p) - p p^T`` of the softmax to ``grad``."""
    return torch._softmax_backward_data(grad, probabilities, -1, grad.dtype)


def _reinmax_backward(
    logits: Tensor, probabilities: Tensor, indices: Tensor, grad: Tensor
) -> Tensor:
    """Heun's method: twice the Jacobian at the midpoint minus half of the one at the start."""
    half = probabilities.new_full((), 0.5).expand(*indices.shape, 1)
    midpoint = (probabilities / 2).scatter_add(-1, indices.unsqueeze(-1), half)
    start = logits.softmax(dim=-1)
    return 2 * _softmax_backward(midpoint, grad) - _softmax_backward(start, grad) / 2
