"""Swin transformer layer for feature maps of any size."""

from typing import final

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import (
    check_at_least,
    check_feature_map,
    check_interval,
    check_positive,
)
from vqprior._placement import Placed
from vqprior.nn._windows import arrange_windows, name_offsets

# Initial standard deviation of the relative position bias, from the authors' code.
_BIAS_STD = 0.02


@final
class SwinLayer(Placed):
    """Swin transformer layer: (shifted) window attention and a two-layer MLP, both residual.

    With windows of ``m`` x ``m`` positions and a shift ``s``, two positions attend to each other
    if and only if both ``(row - s) // m`` and ``(column - s) // m`` agree. Any height and width
    works: windows at the borders are smaller. To connect the windows, alternate layers of shift 0
    and ``window_size // 2``.

    The output is in channels-last memory format; an input in this format is not copied. Window
    indices are cached for the last few sizes.

    Args:
        channels: Number of channels ``c``, a multiple of ``num_heads``.
        num_heads: Number of attention heads, at least 1.
        window_size: Side of a window in positions, at least 1.
        shift: Offset of the window grid in positions, in ``[0, window_size)``.
        mlp_ratio: Hidden size of the MLP as a multiple of ``channels``, greater than 0; the product
            is rounded down to at least 1.

    Raises:
        ValueError: If an argument is out of range, or ``channels`` is not a multiple of
            ``num_heads``.

    Shape:
        - input: ``(b, c, h, w)``
        - output: ``(b, c, h, w)``

    References:
        Liu et al., *Swin Transformer: Hierarchical Vision Transformer using Shifted Windows*,
        ICCV 2021, equations 3 and 4. Deviations from the authors' code: a map smaller than a
        window is still shifted, and no position attends to padding.
        <https://arxiv.org/abs/2103.14030>

    Examples:
        >>> import torch
        >>> from vqprior.nn import SwinLayer
        >>> layers = torch.nn.Sequential(
        ...     SwinLayer(32, num_heads=4, window_size=8),
        ...     SwinLayer(32, num_heads=4, window_size=8, shift=4),
        ... )
        >>> layers(torch.randn(2, 32, 20, 13)).shape
        torch.Size([2, 32, 20, 13])
    """

    relative_index: Tensor

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        window_size: int = 8,
        shift: int = 0,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_at_least("num_heads", num_heads, 1)
        check_at_least("window_size", window_size, 1)
        check_interval("shift", shift, 0, window_size)
        check_positive("mlp_ratio", mlp_ratio)
        if channels < 1 or channels % num_heads != 0:
            raise ValueError(
                f"`channels` must be a positive multiple of num_heads = {num_heads}, got "
                f"{channels}."
            )
        self.channels = channels
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        hidden = max(1, int(channels * mlp_ratio))
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)
        )
        self.relative_bias = nn.Parameter(torch.empty(num_heads, (2 * window_size - 1) ** 2))
        nn.init.trunc_normal_(self.relative_bias, std=_BIAS_STD)
        offsets = name_offsets(window_size, window_size, window_size)
        self._set_constant("relative_index", lambda: torch.from_numpy(offsets))

    def extra_repr(self) -> str:
        """Shows the geometry in ``repr``."""
        return (
            f"{self.channels}, num_heads={self.num_heads}, window_size={self.window_size}, "
            f"shift={self.shift}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transforms ``x`` ``(b, c, h, w)``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not of shape ``(b, c, h, w)``.
        """
        check_feature_map("x", x, self.channels)
        # The only change of layout: all later operations, and the next layer, work on contiguous
        # features, which is what channels-last means.
        tokens = x.permute(0, 2, 3, 1).contiguous()
        attended: Tensor = self.proj(self._attend(self.norm1(tokens)))
        tokens = tokens + attended
        transformed: Tensor = self.mlp(self.norm2(tokens))
        return (tokens + transformed).permute(0, 3, 1, 2)

    def _attend(self, tokens: Tensor) -> Tensor:
        """Applies attention within each window, ``(b, h, w, c)``."""
        if _must_not_remember(tokens):
            return self._attend_masked(tokens)
        batch, height, width, channels = tokens.shape
        windows = arrange_windows(batch, height, width, self.window_size, self.shift, tokens.device)
        # Windows are grouped by shape and never padded, so there is nothing to mask.
        qkv: Tensor = self.qkv(tokens.flatten(0, 2).index_select(0, windows.order))
        # Not cached: parameters can change unnoticed through `.data`, and gathering is cheap.
        bias = self.relative_bias.index_select(1, windows.offsets).to(qkv.dtype)
        parts = qkv.split([count * length for count, length in windows.shapes])
        biases = bias.split([length**2 for _, length in windows.shapes], dim=1)
        attended = []
        for part, mask, (count, length) in zip(parts, biases, windows.shapes, strict=True):
            heads = part.view(count, length, 3, self.num_heads, channels // self.num_heads)
            q, k, v = (one.transpose(1, 2) for one in heads.unbind(2))
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask.view(1, self.num_heads, length, length)
            )
            attended.append(mixed.transpose(1, 2).reshape(count * length, channels))
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        return joined.index_select(0, windows.place).view(tokens.shape)

    def _attend_masked(self, tokens: Tensor) -> Tensor:
        """Computes the same as one masked attention, whose trace is valid for other map sizes."""
        m, (height, width) = self.window_size, tokens.shape[1:3]
        rows, columns = -(-height // m), -(-width // m)
        bottom, right = rows * m - height, columns * m - width
        # Projecting before padding saves work; padding is masked anyway.
        qkv = F.pad(self.qkv(tokens), (0, 0, 0, right, 0, bottom))
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), dims=(1, 2))
        q, k, v = rearrange(
            qkv,
            "b (rows y) (columns x) (three heads e) -> three b (rows columns) heads (y x) e",
            three=3,
            heads=self.num_heads,
            y=m,
            x=m,
        ).unbind(0)
        relative_index = self._constant("relative_index", tokens.device)
        bias = self.relative_bias[:, relative_index].to(q.dtype)
        if self.shift or bottom or right:
            # One mask per window. Windows are merged with heads, so the batch shares the mask and
            # attention stays four-dimensional, as its fast kernels require.
            same = self._same_region(height, width, tokens.device)
            mask = bias.where(same.unsqueeze(1), float("-inf")).flatten(0, 1)
            merge = 1
        else:
            mask, merge = bias, 0
        shape = q.shape
        q, k, v = (part.flatten(merge, merge + 1) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(0))
        joined = rearrange(
            attended.reshape(shape),
            "b (rows columns) heads (y x) e -> b (rows y) (columns x) (heads e)",
            rows=rows,
            y=m,
        )
        if self.shift:
            joined = joined.roll((self.shift, self.shift), dims=(1, 2))
        return joined[:, :height, :width]

    def _same_region(self, height: int, width: int, device: torch.device) -> Tensor:
        """Whether two positions of a rolled window may attend: ``(windows, m*m, m*m)``.

        The roll moves the first ``shift`` rows (columns) after the last ones, into windows where
        they do not belong. Padding is a region of its own, so every position attends to one.
        """
        rows = self._regions(height, device)
        columns = self._regions(width, device)
        labels = rearrange(
            3 * rows.unsqueeze(1) + columns,
            "(rows y) (columns x) -> (rows columns) (y x)",
            y=self.window_size,
            x=self.window_size,
        )
        return labels.unsqueeze(2) == labels.unsqueeze(1)

    def _regions(self, size: int, device: torch.device) -> Tensor:
        """Labels the positions of one axis: 0 wrapped by the roll, 1 regular, 2 padding."""
        position = torch.arange(size + -size % self.window_size, device=device)
        label = (position >= self.shift).long()
        return label.masked_fill(position >= size, 2).roll(-self.shift)


def _must_not_remember(tokens: Tensor) -> bool:
    """Whether ``tokens`` are traced, fake or captured, so that cached tensors must not be used.

    A CUDA graph would keep reading tensors that the cache has dropped.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or type(tokens) is not Tensor
        or (tokens.is_cuda and torch.cuda.is_current_stream_capturing())
    )
