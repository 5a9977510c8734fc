"""Which tokens unused codes move onto: drawn from the joint batch of all ranks."""

import numpy as np
import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._results import Selection
from vqprior.functional._kernels._host import is_on_host
from vqprior.functional._random import counter_integer


def draw_candidates(selections: list[Selection], chance: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token of the joint batch for each code, without knowing on the host how many
    tokens count.

    Args:
        selections: What the codebook saw on this rank.
        chance: An integer from 0 for each code.

    Returns:
        Tokens and their squared distance to the code they chose; zeros where they are those of
        another rank.

    Shape:
        - ``chance``: ``(k,)``
        - returns: ``(k, d)`` and ``(k, 1)``
    """
    inputs = _joined([s.inputs.reshape(-1, s.inputs.shape[-1]) for s in selections])
    codes = _joined([s.codes.reshape(-1, s.codes.shape[-1]) for s in selections])
    mask = _joined([s.mask.reshape(-1) for s in selections])
    turn, mine = chance % mask.sum().clamp_min(1), None
    if _distributed.is_active():
        turn, mine = _own_turns(torch.stack([s.mask.sum() for s in selections]), chance)
    if mask.shape[0] == 0:
        zeros = torch.zeros(len(chance), inputs.shape[1] + 1, device=inputs.device)
        return zeros[:, :-1], zeros[:, -1:]
    # The t-th counted token is the first place where the running count exceeds t.
    place = torch.searchsorted(mask.cumsum(0), turn, right=True).clamp_max(mask.shape[0] - 1)
    tokens = inputs.index_select(0, place).float()
    errors = tokens - codes.index_select(0, place).float()
    errors = errors.square().sum(dim=1, keepdim=True)
    if mine is not None:
        tokens, errors = torch.where(mine, tokens, 0.0), torch.where(mine, errors, 0.0)
    return tokens, errors


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat(parts).detach()


def _own_turns(local: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which counted token of this rank is drawn, and whether it is one of this rank.

    ``local`` are the numbers of counted tokens of each selection. Selections follow each other, and
    the ranks within each: the order of the joint batch.
    """
    per_rank = _distributed.all_gather_stack(local)
    joint = per_rank.sum(dim=0)
    before = joint.cumsum(0) - joint + per_rank[: _distributed.rank()].sum(dim=0)
    turn = (chance % joint.sum().clamp_min(1)).unsqueeze(1) - before
    own = (turn >= 0) & (turn < local)
    turn = torch.where(own, turn + local.cumsum(0) - local, 0).sum(dim=1)
    return turn, own.any(dim=1, keepdim=True)


def is_new(candidates: Tensor, errors: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a token is further from its code than a learned code settles from its tokens.

    A code on top of its tokens still keeps a distance: what its dtype cannot resolve, and the
    bias of a smoothed average. Without the margin, revival on data with fewer distinct vectors
    than codes would never end. The spread is that of the drawn tokens: an offset is no spread, and
    neither are a few tokens far from all others.

    Shape:
        - ``candidates``: ``(k, d)``
        - ``errors``: ``(k, 1)``
        - returns: ``(k,)``
    """
    center = _ranked(candidates, len(candidates) // 2)
    distances = (candidates - center).square().sum(dim=1)
    spread = _ranked(distances, 9 * len(candidates) // 10)
    resolution = 1e-5 + torch.finfo(dtype).eps
    margin = candidates.square().sum(dim=1).mul_(resolution**2).add_(spread, alpha=1e-6)
    return errors.squeeze(1) > margin


def _ranked(values: Tensor, place: int) -> Tensor:
    """Returns what sorting along the first dimension brings to ``place``."""
    if is_on_host(values):
        return torch.as_tensor(np.partition(values.numpy(), place, axis=0)[place])
    return values.sort(dim=0).values[place]


def draw_integers(seed: int, step: Tensor | int, count: int, device: torch.device) -> Tensor:
    """Returns ``count`` integers from 0 that depend on ``seed`` and ``step`` alone."""
    counter = torch.arange(1, count + 1, device=device) + step * count
    first = (seed << 32) + (1 << 63)
    return counter_integer(counter + (first % (1 << 64) - (1 << 63)))  # as int64 wraps around
