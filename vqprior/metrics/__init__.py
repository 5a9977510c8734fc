"""Streaming metrics that support ``torch.distributed``, and per-image functions."""

from vqprior.metrics._codebook_usage import CodebookUsage, UsageSummary
from vqprior.metrics._frechet import FrechetDistance
from vqprior.metrics._gmsd import gmsd
from vqprior.metrics._images import rgb_to_luma
from vqprior.metrics._psnr import psnr
from vqprior.metrics._ssim import ssim
from vqprior.metrics._streaming_mean import StreamingMean

__all__ = [
    "CodebookUsage",
    "FrechetDistance",
    "StreamingMean",
    "UsageSummary",
    "gmsd",
    "psnr",
    "rgb_to_luma",
    "ssim",
]
