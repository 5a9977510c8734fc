"""Learned halving and doubling of feature maps."""

from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_at_least, check_feature_map

# From a 3x3 kernel to the 4x4 kernel of `_repeat_and_convolve`: along each axis its entries are
# the last of the three, the last two added, the first two added, and the first.
_ONE_AXIS = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
_SUMS = np.kron(_ONE_AXIS, _ONE_AXIS).tolist()
# Below either of these, what is saved does not always make up for the sums.
_MIN_POSITIONS = 256
_MIN_CHANNELS = 32


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
        if _sums_pay(x, self.conv):
            return _repeat_and_convolve(x, self.conv.weight, self.conv.bias)
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled


def _repeat_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Repeats each position 2x2 and convolves 3x3, with 16 products in place of 36.

    Of the nine positions that an output sees, only four differ. So each of these needs one
    product, with the sum of the entries of the kernel that fall on it; which entries depends on
    where in its 2x2 the output lies. A transposed convolution of stride 2 does just that.
    """
    sums = weight.new_tensor(_SUMS)
    if _is_channels_last(x) or _is_channels_last(weight):
        # Transposed as a matrix: that is several times faster than the copy of a permutation.
        entries = weight.permute(0, 2, 3, 1).flatten(1).t().contiguous()
        entries = entries.view(9, weight.shape[1], weight.shape[0]).transpose(0, 1)
        kernel = (sums.t() @ entries).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    else:
        kernel = (weight.transpose(0, 1).flatten(2) @ sums).unflatten(2, (4, 4))
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def _sums_pay(x: Tensor, conv: nn.Module) -> bool:
    """Whether ``_repeat_and_convolve`` computes what ``conv`` would, and is known to be faster.

    Not under a compiler, whose graph would fit fewer sizes; and not in low precision, which
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
    """Whether calling ``conv`` is the plain convolution: nothing replaces it or hooks into it."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and not (conv._forward_pre_hooks or conv._forward_hooks)
        and not (conv._backward_pre_hooks or conv._backward_hooks)
        and vars(conv).keys().isdisjoint(("forward", "_conv_forward"))
    )


def _is_channels_last(x: Tensor) -> bool:
    # By the stride, since `vmap` cannot be asked for this memory format.
    return x.stride(1) == 1 and not x.is_contiguous()
