"""How much a picture holds that a picture of a quarter the size cannot."""

import torch
from torch import Tensor

from tvqrap.models.assembly import SCALE


def detail_energy(luma: Tensor) -> Tensor:
    """The energy of ``(..., h, w)`` at frequencies that a picture of a quarter the size lacks."""
    height, width = luma.shape[-2:]
    window = torch.outer(torch.hann_window(height), torch.hann_window(width))
    spectrum: Tensor = torch.fft.fft2((luma - luma.mean()) * window).abs().square()
    y, x = torch.fft.fftfreq(height).abs()[:, None], torch.fft.fftfreq(width).abs()
    return spectrum[..., torch.maximum(y, x) > 0.5 / SCALE].sum()
