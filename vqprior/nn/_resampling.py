"""Learned halving and doubling of feature maps."""

from typing import final

from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_at_least, check_feature_map


@final
class Downsample(nn.Module):
    """Halves height and width with a 3x3 convolution of stride 2.

    Zeros are added below and to the right only, as VQGAN does, so output position ``i`` sees
    the rows ``2i``, ``2i + 1`` and ``2i + 2``. An odd last row or column is seen, but has no
    output of its own: ``h`` becomes ``h // 2``.

    Args:
        in_channels: Number of channels of the input, at least 1.
        out_channels: Number of channels of the output, at least 1; by default ``in_channels``.

    Raises:
        ValueError: If ``in_channels`` or ``out_channels`` is below 1.

    Shape:
        - input: ``(b, in_channels, h, w)`` with ``h`` and ``w`` at least 2
        - output: ``(b, out_channels, h // 2, w // 2)``

    References:
        Esser, Rombach and Ommer, *Taming Transformers for High-Resolution Image Synthesis*,
        CVPR 2021, table 7 of the appendix; the padding is that of the authors' code.
        <https://arxiv.org/abs/2012.09841>

    Examples:
        >>> import torch
        >>> from vqprior.nn import Downsample
        >>> Downsample(16, 32)(torch.randn(2, 16, 8, 6)).shape
        torch.Size([2, 32, 4, 3])
    """

    def __init__(self, in_channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_at_least("in_channels", in_channels, 1)
        check_at_least("out_channels", out_channels, 1)
        self.in_channels = in_channels
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``(b, in_channels, h, w)`` to ``(b, out_channels, h // 2, w // 2)``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not of shape ``(b, in_channels, h, w)`` with ``h`` and
                ``w`` at least 2.
        """
        check_feature_map("x", x, self.in_channels, min_size=2)
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


@final
class Upsample(nn.Module):
    """Doubles height and width: repeats each position 2x2, then convolves 3x3.

    Args:
        in_channels: Number of channels of the input, at least 1.
        out_channels: Number of channels of the output, at least 1; by default ``in_channels``.

    Raises:
        ValueError: If ``in_channels`` or ``out_channels`` is below 1.

    Shape:
        - input: ``(b, in_channels, h, w)``
        - output: ``(b, out_channels, 2 * h, 2 * w)``

    References:
        Odena, Dumoulin and Olah, *Deconvolution and Checkerboard Artifacts*, Distill 2016,
        section "Better upsampling". <https://distill.pub/2016/deconv-checkerboard>

    Examples:
        >>> import torch
        >>> from vqprior.nn import Upsample
        >>> Upsample(32, 16)(torch.randn(2, 32, 4, 3)).shape
        torch.Size([2, 16, 8, 6])
    """

    def __init__(self, in_channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        check_at_least("in_channels", in_channels, 1)
        check_at_least("out_channels", out_channels, 1)
        self.in_channels = in_channels
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``(b, in_channels, h, w)`` to ``(b, out_channels, 2 * h, 2 * w)``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not of shape ``(b, in_channels, h, w)``.
        """
        check_feature_map("x", x, self.in_channels)
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled
