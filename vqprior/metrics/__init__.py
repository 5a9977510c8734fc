"""Streaming measures, right under ``torch.distributed``, and what they average."""

from vqprior.metrics._picture import gmsd, psnr, rgb_to_luma, ssim
from vqprior.metrics._usage import CodebookUsage, UsageSummary

__all__ = ["CodebookUsage", "UsageSummary", "gmsd", "psnr", "rgb_to_luma", "ssim"]
