"""Network blocks for vector-quantized models."""

from vqprior.nn._discriminator import PatchDiscriminator
from vqprior.nn._l2_norm import L2Norm
from vqprior.nn._normalization import ChannelNorm, group_norm
from vqprior.nn._resampling import Downsample, Upsample
from vqprior.nn._residual_block import ResidualBlock
from vqprior.nn._scale_refinement import ScaleRefinement
from vqprior.nn._swin import SwinLayer

__all__ = [
    "ChannelNorm",
    "Downsample",
    "L2Norm",
    "PatchDiscriminator",
    "ResidualBlock",
    "ScaleRefinement",
    "SwinLayer",
    "Upsample",
    "group_norm",
]
