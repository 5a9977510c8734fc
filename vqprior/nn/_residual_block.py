"""Residual block of VQGAN."""

from collections.abc import Callable
from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_at_least, check_feature_map
from vqprior.nn._normalization import group_norm


@final
class ResidualBlock(nn.Module):
    """Residual block of VQGAN: two normalized 3x3 convolutions and a skip connection.

    Computes ``conv(silu(norm(conv(silu(norm(x)))))) + skip(x)``. The skip connection is the
    identity if the numbers of channels are equal, otherwise a 1x1 convolution. The size of the
    map is kept; borders are padded with zeros.

    Args:
        in_channels: Number of channels of the input, at least 1.
        out_channels: Number of channels of the output, at least 1; by default ``in_channels``.
        norm: Builds a normalization layer from a number of channels: ``group_norm``,
            ``ChannelNorm``, ``torch.nn.Identity`` or another callable.

    Raises:
        ValueError: If ``in_channels`` or ``out_channels`` is below 1.

    Shape:
        - input: ``(b, in_channels, h, w)``
        - output: ``(b, out_channels, h, w)``

    References:
        Esser, Rombach and Ommer, *Taming Transformers for High-Resolution Image Synthesis*,
        CVPR 2021, table 7 of the appendix, without dropout. <https://arxiv.org/abs/2012.09841>

    Examples:
        >>> import torch
        >>> from vqprior.nn import ChannelNorm, ResidualBlock
        >>> block = ResidualBlock(16, 32, norm=ChannelNorm)
        >>> block(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        norm: Callable[[int], nn.Module] = group_norm,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_at_least("in_channels", in_channels, 1)
        check_at_least("out_channels", out_channels, 1)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, kernel_size=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``(b, in_channels, h, w)`` to ``(b, out_channels, h, w)``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not of shape ``(b, in_channels, h, w)``.
        """
        check_feature_map("x", x, self.in_channels)
        hidden: Tensor = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        # The first operand decides the memory format of the sum. With ChannelNorm, `hidden` is
        # channels-last, and keeping that saves the next block a copy.
        summed: Tensor = hidden + self.skip(x)
        return summed
