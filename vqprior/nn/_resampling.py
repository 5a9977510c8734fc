"""Learned downsampling and upsampling of feature maps by a factor of 2."""

from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_at_least, check_feature_map

# Converts a 3x3 kernel to the 4x4 kernel of `_repeat_and_convolve`. Along each axis, the four
# entries are: last, sum of the last two, sum of the first two, first.
_ONE_AXIS = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
_SUMS = np.kron(_ONE_AXIS, _ONE_AXIS).tolist()
# Below either of these, the savings do not always pay for computing the sums.
_MIN_POSITIONS = 256
_MIN_CHANNELS = 32


@final
class Downsample(nn.Module):
    """Halves height and width with a 3x3 convolution of stride 2.

    As in VQGAN, zeros are padded at the bottom and right only, so output row ``i`` sees the rows
    ``2i``, ``2i + 1`` and ``2i + 2``. ``h`` becomes ``h // 2``, also for odd ``h``.

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
    """Doubles height and width by nearest-neighbor interpolation and a 3x3 convolution.

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
        if _sums_pay(x, self.conv):
            return _repeat_and_convolve(x, self.conv.weight, self.conv.bias)
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


def _repeat_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Repeats each position 2x2 and convolves 3x3, with 16 products instead of 36.

    Of the nine inputs of an output, only four differ, so four products with sums of kernel entries
    suffice. Which entries are summed depends on the output's place in its 2x2 block. This is a
    transposed convolution of stride 2.
    """
    sums = weight.new_tensor(_SUMS)
    if _is_channels_last(x) or _is_channels_last(weight):
        # Transposing as a matrix is several times faster than copying a permutation.
        entries = weight.permute(0, 2, 3, 1).flatten(1).t().contiguous()
        entries = entries.view(9, weight.shape[1], weight.shape[0]).transpose(0, 1)
        kernel = (sums.t() @ entries).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    else:
        kernel = (weight.transpose(0, 1).flatten(2) @ sums).unflatten(2, (4, 4))
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def _sums_pay(x: Tensor, conv: nn.Module) -> bool:
    """Whether ``_repeat_and_convolve`` computes the same as ``conv``, and faster.

    False while compiling, since the graph would fit fewer sizes, and in low precision, which
    would round the sums.
    """
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch.finfo(x.dtype).bits >= 32
        and x.shape[1] >= _MIN_CHANNELS
        and x.numel() >= _MIN_POSITIONS * x.shape[1]
        and _is_as_built(conv)
    )


def _is_as_built(conv: nn.Module) -> bool:
    """Whether ``conv`` is still the original convolution, without hooks or replacements."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and not (conv._forward_pre_hooks or conv._forward_hooks)
        and not (conv._backward_pre_hooks or conv._backward_hooks)
        and vars(conv).keys().isdisjoint(("forward", "_conv_forward"))
    )


def _is_channels_last(x: Tensor) -> bool:
    # Tests the stride, since `vmap` does not support querying this memory format.
    return x.stride(1) == 1 and not x.is_contiguous()
