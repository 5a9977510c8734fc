"""Normalization of feature maps: per position, and per group of channels."""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_at_least, check_feature_map, check_positive

# As in VQGAN; torch's default is 1e-5.
_EPS = 1e-6
_MAX_GROUPS = 32


@final
class ChannelNorm(nn.Module):
    """Layer normalization over the channels of each position of a feature map.

    The result at a position does not depend on the size of the image: a network of convolutions
    and ``ChannelNorm`` gives the same values on a tile as on the whole image, away from the
    borders of the tile. With ``group_norm`` it does not.

    Args:
        channels: Number of channels ``c``, at least 1.
        eps: Added to the variance, greater than 0.

    Raises:
        ValueError: If ``channels`` is below 1, or ``eps`` is not greater than 0.

    Shape:
        - input: ``(b, c, h, w)``
        - output: ``(b, c, h, w)``

    References:
        Ba, Kiros and Hinton, *Layer Normalization*, 2016, equation 3, over the channels alone.
        <https://arxiv.org/abs/1607.06450>

    Examples:
        >>> import torch
        >>> from vqprior.nn import ChannelNorm
        >>> norm = ChannelNorm(4)
        >>> x = torch.arange(4.0).reshape(1, 4, 1, 1)
        >>> norm(x).detach().flatten()
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """

    def __init__(self, channels: int, *, eps: float = _EPS) -> None:
        super().__init__()
        check_at_least("channels", channels, 1)
        check_positive("eps", eps)
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def extra_repr(self) -> str:
        """Shows the constructor's arguments in ``repr``."""
        return f"{self.channels}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes ``x`` ``(b, c, h, w)``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not of shape ``(b, c, h, w)``.
        """
        check_feature_map("x", x, self.channels)
        features_last = x.permute(0, 2, 3, 1)
        normalized = F.layer_norm(features_last, (self.channels,), self.weight, self.bias, self.eps)
        return normalized.permute(0, 3, 1, 2)


def group_norm(channels: int) -> nn.GroupNorm:
    """Builds the group normalization of VQGAN, for any number of channels.

    Args:
        channels: Number of channels, at least 1.

    Returns:
        A ``torch.nn.GroupNorm`` with ``gcd(32, channels)`` groups and ``eps=1e-6``: 32 groups,
        as in VQGAN, if they divide the channels. Statistics cover the whole image, so results
        depend on its size; ``ChannelNorm`` avoids that.

    Raises:
        ValueError: If ``channels`` is below 1.

    Shape:
        - input of the module: ``(b, channels, h, w)``
        - output of the module: ``(b, channels, h, w)``

    References:
        Wu and He, *Group Normalization*, ECCV 2018. <https://arxiv.org/abs/1803.08494>

    Examples:
        >>> from vqprior.nn import group_norm
        >>> group_norm(96).num_groups, group_norm(12).num_groups, group_norm(3).num_groups
        (32, 4, 1)
    """
    check_at_least("channels", channels, 1)
    return nn.GroupNorm(math.gcd(_MAX_GROUPS, channels), channels, eps=_EPS)
