"""Wrappers of ``torch.distributed``; no other module imports it.

Without a process group, each function behaves as with one rank. So callers need no branch, and
every rank reaches every collective.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_active() -> bool:
    """Whether a process group exists now; not cached, since groups can start and end."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    """Returns the index of this rank, from 0."""
    return dist.get_rank() if is_active() else 0


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sums ``tensor`` over the ranks, in place, and returns it."""
    if is_active():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_sums(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the sums of tensors over the ranks, by one collective; dtypes must agree."""
    if not is_active():
        return tensors
    fused = all_reduce_sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    pieces = fused.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Returns the sum of ``tensor`` over the ranks, differentiably.

    The backward pass sums the gradients over the ranks, so either every rank or none must run
    backward through the result.
    """
    return _AllReduceSum.apply(tensor) if is_active() else tensor


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ANN401
        return all_reduce_sum_(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        return all_reduce_sum(grad)


def all_gather_stack(tensor: Tensor) -> Tensor:
    """Stacks the tensors of all ranks, which must have equal shapes: ``(...) -> (ranks, ...)``."""
    if not is_active():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.stack(gathered)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates ``(n_r, ...)`` of every rank in rank order; the ``n_r`` may differ."""
    if not is_active():
        return rows
    sizes = all_gather_stack(torch.tensor(rows.shape[0], device=rows.device)).tolist()
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    stacked = all_gather_stack(padded)
    return torch.cat([part[:size] for part, size in zip(stacked, sizes, strict=True)])


def broadcast_(tensor: Tensor) -> Tensor:
    """Overwrites ``tensor`` in place with that of rank 0 and returns it."""
    if is_active():
        dist.broadcast(tensor, src=0)
    return tensor


def check_whole(codebook: nn.Module) -> None:
    """Raises ``TypeError`` if FSDP has sharded parameters or joined them with those of others."""
    tensors = [*codebook.parameters(), *codebook.buffers()]
    if not tensors or any(hasattr(tensor, "full_tensor") for tensor in tensors):
        raise TypeError(
            "`codebook` must be whole on every rank to be written to, got a sharded parameter. "
            "Set codes before sharding, and use `default_rules`, built before sharding, which "
            "turn the codebook into buffers."
        )
