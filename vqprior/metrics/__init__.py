"""Streaming metrics, right under ``torch.distributed``, and their per-image functions."""

from vqprior.metrics._codebook_usage import CodebookUsage, UsageSummary
from vqprior.metrics._frechet import FrechetDistance
from vqprior.metrics._gmsd import GMSD, gmsd
from vqprior.metrics._images import rgb_to_luma
from vqprior.metrics._psnr import PSNR, psnr
from vqprior.metrics._ssim import SSIM, ssim

__all__ = [
    "GMSD",
    "PSNR",
    "SSIM",
    "CodebookUsage",
    "FrechetDistance",
    "UsageSummary",
    "gmsd",
    "psnr",
    "rgb_to_luma",
    "ssim",
]
