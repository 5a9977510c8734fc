"""The one importer of ``torch.distributed``; every question is asked at call time.

Without a process group each function is the identity of one process, so callers never branch:
every rank reaches every collective.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_active() -> bool:
    """Whether a process group exists now. Never cached: groups come and go."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if is_active() else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if is_active() else 0


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sums ``tensor`` over the ranks, in place, and returns it."""
    if is_active():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_sums(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the sums of tensors of one dtype over the ranks, by one collective."""
    if not is_active():
        return tensors
    fused = all_reduce_sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    pieces = fused.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Returns the sum of ``tensor`` over the ranks, differentiably.

    Backward sums the gradients over the ranks: that of the sum of all ranks' losses. Every rank
    must therefore go backward through the result, or none.
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
    """Stacks the equally shaped tensors of all ranks: ``(...) -> (ranks, ...)``."""
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
    """Overwrites ``tensor`` with that of rank 0, in place, and returns it."""
    if is_active():
        dist.broadcast(tensor, src=0)
    return tensor


def check_whole(codebook: nn.Module) -> None:
    """Raises ``TypeError`` if a rank holds a part of the codebook only."""
    if any(hasattr(parameter, "full_tensor") for parameter in codebook.parameters()):
        raise TypeError(
            "`codebook` must be whole on every rank to be written to, got a sharded parameter. "
            "Leave it out: `fully_shard(model, ignored_params=set(codebook.parameters()))`."
        )
