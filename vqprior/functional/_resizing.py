"""Downsampling and upsampling of feature maps with features last."""

import torch
from torch import Tensor
from torch.nn import functional as F

_MODES = {1: "linear", 2: "bicubic", 3: "trilinear"}


def average_down(x: Tensor, mask: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Averages ``(b, *spatial, d)`` over the valid positions in each cell of a coarser grid.

    Returns the means ``(b, *size, d)`` and the mask of cells with a valid position
    ``(b, *size)``; all other cells are zero.
    """
    weight = mask.unsqueeze(-1).to(x.dtype)
    both = torch.cat([x * weight, weight], dim=-1).movedim(-1, 1)
    both = F.interpolate(both, size=size, mode="area").movedim(1, -1)
    sums, share = both[..., :-1], both[..., -1:]
    seen = share > 0
    return torch.where(seen, sums / torch.where(seen, share, 1.0), 0.0), seen.squeeze(-1)


def enlarge(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Upsamples ``(b, *spatial, d)`` to ``(b, *size, d)``: linear, bicubic or trilinear."""
    channels_first = x.movedim(-1, 1)
    mode = _MODES[len(size)]
    enlarged = F.interpolate(channels_first, size=size, mode=mode, align_corners=False)
    return enlarged.movedim(1, -1).contiguous()
