"""Network blocks that vector-quantized models need, on feature maps ``(b, c, h, w)``."""

from vqprior.nn._discriminator import PatchDiscriminator
from vqprior.nn._normalization import ChannelNorm, group_norm
from vqprior.nn._resampling import Downsample, Upsample
from vqprior.nn._residual_block import ResidualBlock
from vqprior.nn._swin import SwinLayer

__all__ = [
    "ChannelNorm",
    "Downsample",
    "PatchDiscriminator",
    "ResidualBlock",
    "SwinLayer",
    "Upsample",
    "group_norm",
]
