"""PatchGAN discriminator."""

from collections.abc import Callable
from typing import final

from torch import Tensor, nn

from vqprior._checks import check_at_least, check_feature_map

_SLOPE = 0.2
_WEIGHT_STD = 0.02
# Channels double with each layer up to this multiple of `width`.
_MAX_MULTIPLE = 8


@final
class PatchDiscriminator(nn.Module):
    """PatchGAN discriminator of pix2pix: one logit per overlapping patch, large for real ones.

    Applies ``num_layers`` 4x4 convolutions of stride 2 and two of stride 1, with leaky ReLUs of
    slope 0.2 in between; all but the first and the last are normalized. With the default of three
    layers, the receptive field is 70 x 70 pixels.

    Weights are initialized from a normal distribution of standard deviation 0.02. In training
    mode, ``BatchNorm2d`` updates its running statistics in each call.

    Args:
        in_channels: Number of channels of the image, at least 1.
        width: Number of channels of the first layer, at least 1; it doubles with each layer, up to
            ``8 * width``.
        num_layers: Number of layers of stride 2, at least 1.
        norm: Builds a normalization layer from a number of channels. Convolutions before
            ``torch.nn.BatchNorm2d`` have no bias, since the norm would cancel it.

    Raises:
        ValueError: If ``in_channels``, ``width`` or ``num_layers`` is below 1.

    Shape:
        - input: ``(b, in_channels, h, w)`` with ``h`` and ``w`` at least
          ``3 * 2**num_layers``
        - output: ``(b, 1, h // 2**num_layers - 2, w // 2**num_layers - 2)``

    References:
        Isola, Zhu, Zhou and Efros, *Image-to-Image Translation with Conditional Adversarial
        Networks*, CVPR 2017, section 3.2.2 and appendix 6.1.2.
        <https://arxiv.org/abs/1611.07004>

    Examples:
        >>> import torch
        >>> from vqprior.nn import PatchDiscriminator
        >>> PatchDiscriminator(width=8)(torch.randn(2, 3, 64, 48)).shape
        torch.Size([2, 1, 6, 4])
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        width: int = 64,
        num_layers: int = 3,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_at_least("in_channels", in_channels, 1)
        check_at_least("width", width, 1)
        check_at_least("num_layers", num_layers, 1)
        self.in_channels = in_channels
        self.num_layers = num_layers
        layers: list[nn.Module] = [_conv(in_channels, width, stride=2), nn.LeakyReLU(_SLOPE)]
        channels = width
        for layer in range(1, num_layers + 1):
            wider = width * min(2**layer, _MAX_MULTIPLE)
            conv = _conv(
                channels,
                wider,
                stride=2 if layer < num_layers else 1,
                bias=norm is not nn.BatchNorm2d,
            )
            layers += [conv, norm(wider), nn.LeakyReLU(_SLOPE)]
            channels = wider
        self.layers = nn.Sequential(*layers, _conv(channels, 1, stride=1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits ``(b, 1, h', w')`` of the patches of ``x``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not of shape ``(b, in_channels, h, w)``, or is too small for
                one logit.
        """
        check_feature_map("x", x, self.in_channels, min_size=3 * 2**self.num_layers)
        logits: Tensor = self.layers(x)
        return logits


def _conv(in_channels: int, out_channels: int, *, stride: int, bias: bool = True) -> nn.Conv2d:
    """Builds a 4x4 convolution with the initialization of pix2pix."""
    conv = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)
    nn.init.normal_(conv.weight, std=_WEIGHT_STD)
    return conv
