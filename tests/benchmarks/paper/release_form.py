"""The same network in the operations of the authors' release.

Written from a description of the release: repetition and a convolution where ours has one product
for four pixels; windows that are rolled, cut out and masked; masks stored for one size of the map
and, for other sizes, made on the CPU in every layer at every call; a softmax between two products;
conversions between tokens and maps; ``x * sigmoid(x)``.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvqrap.models.official_checkpoint import shift_mask
from tvqrap.models.paper import Skip
from vqprior.nn import ResidualBlock, SwinLayer, Upsample


def in_release_form(model: nn.Module) -> nn.Module:
    """Returns a copy of a super-resolver in the release's form, with the same results."""
    return _replaced(copy.deepcopy(model), grid=32)


def _replaced(module: nn.Module, *, grid: int) -> nn.Module:
    for name, child in module.named_children():
        # Maps of the structure's expander are half as large.
        own_grid = 16 if name == "expander" else grid
        if isinstance(child, Upsample):
            setattr(module, name, Doubling(child))
        elif isinstance(child, ResidualBlock):
            setattr(module, name, ResidualQuantizer(child))
        elif isinstance(child, Skip):
            setattr(module, name, Group(child, own_grid))
        else:
            _replaced(child, grid=own_grid)
    return module


class Doubling(nn.Module):
    """Nearest-neighbor upscaling, then a convolution."""

    def __init__(self, ours: Upsample) -> None:
        super().__init__()
        self.conv = ours.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResidualQuantizer(nn.Module):
    """A residual block with its activation in two operations."""

    def __init__(self, ours: ResidualBlock) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = (
            ours.norm1, ours.conv1, ours.norm2, ours.conv2,
        )  # fmt: skip
        self.skip = ours.skip

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(x)
        hidden = self.conv1(hidden * torch.sigmoid(hidden))
        hidden = self.norm2(hidden)
        hidden = self.conv2(hidden * torch.sigmoid(hidden))
        return hidden + self.skip(x)


class Group(nn.Module):
    """Swin layers on tokens, an optional convolution on a map, and a skip connection."""

    def __init__(self, ours: Skip, grid: int) -> None:
        super().__init__()
        layers = [layer for layer in ours.body if isinstance(layer, SwinLayer)]
        self.layers = nn.ModuleList(Layer(layer, grid) for layer in layers)
        self.conv = None if len(layers) == len(ours.body) else ours.body[-1]

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        tokens = given = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, size)
        if self.conv is not None:
            tokens = self.conv(tokens.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return (tokens + given).transpose(1, 2).unflatten(2, size)


class Layer(nn.Module):
    """One Swin layer on tokens ``(b, h * w, c)``."""

    def __init__(self, ours: SwinLayer, grid: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj, self.norm2, self.mlp = (
            ours.norm1, ours.qkv, ours.proj, ours.norm2, ours.mlp,
        )  # fmt: skip
        self.heads, self.window, self.shift = ours.num_heads, ours.window_size, ours.shift
        self.table = nn.Parameter(ours.relative_bias.detach().t().contiguous())
        self.register_buffer("index", ours.relative_index, persistent=False)
        self.grid = (grid, grid)
        mask = shift_mask(grid, self.window, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)
        self.to(self.table.device)

    def forward(self, tokens: Tensor, size: torch.Size) -> Tensor:
        batch, _, channels = tokens.shape
        mask = self.mask if tuple(size) == self.grid else self._make_mask(size).to(tokens.device)
        x = self.norm1(tokens).view(batch, *size, channels)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        x = self._attend(self._cut(x), mask)
        x = self._join(x, batch, size)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(1, 2))
        tokens = tokens + x.reshape(batch, -1, channels)
        return tokens + self.mlp(self.norm2(tokens))

    def _cut(self, x: Tensor) -> Tensor:
        m = self.window
        b, h, w, c = x.shape
        x = x.view(b, h // m, m, w // m, m, c).permute(0, 1, 3, 2, 4, 5).contiguous()
        return x.view(-1, m * m, c)

    def _join(self, windows: Tensor, batch: int, size: torch.Size) -> Tensor:
        m, (h, w) = self.window, size
        x = windows.view(batch, h // m, w // m, m, m, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
        return x.view(batch, h, w, -1)

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        count, length, channels = windows.shape
        qkv = self.qkv(windows).reshape(count, length, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q * (channels // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(length, length, -1)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            scores = scores.view(-1, len(mask), self.heads, length, length)
            scores = (scores + mask[:, None]).view(count, self.heads, length, length)
        mixed = scores.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(count, length, channels))

    def _make_mask(self, size: torch.Size) -> Tensor:
        """Returns a mask, also without a shift, where the release adds a mask of zeros."""
        m = self.window
        label = torch.zeros(1, *size, 1)
        if self.shift:
            parts = (slice(0, -m), slice(-m, -self.shift), slice(-self.shift, None))
            for row, rows in enumerate(parts):
                for column, columns in enumerate(parts):
                    label[:, rows, columns] = 3 * row + column
        labels = self._cut(label).squeeze(2)
        apart = labels.unsqueeze(1) - labels.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0)
