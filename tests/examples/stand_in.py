"""A model as the scripts expect it, whose every result pixel depends on 7 x 7 input pixels."""

import torch
from torch import nn
from torch.nn import functional as F

from tvqrap.images.layouts import Tiling


class StandIn(nn.Module):
    """Bicubic upscaling and a local, nonlinear filter; exact in tiles of the right overlap."""

    tiling = Tiling(multiple=2, overlap=4)
    codebook_size = 16

    def __init__(self, *, jump=0.0):
        super().__init__()
        self.filter = nn.Conv2d(3, 3, 5, padding=2, padding_mode="replicate")
        self.jump = jump  # what a tile's level depends on: the number of calls so far
        self.calls = []

    def forward(self, lr):
        self.calls.append(tuple(lr.shape))
        upscaled = F.interpolate(lr, scale_factor=4, mode="bicubic")
        return upscaled + 0.1 * torch.tanh(self.filter(upscaled)) + self.jump * len(self.calls)

    def indices(self, lr):
        return (lr.mean(dim=1) * 15).round().long()
