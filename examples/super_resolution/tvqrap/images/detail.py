"""The energy of an image at frequencies that an image of a quarter the size cannot hold."""

import torch
from torch import Tensor

from tvqrap.models.assembly import SCALE


def detail_energy(luma: Tensor) -> Tensor:
    """Returns the energy of ``(..., h, w)`` above the Nyquist frequency of a quarter the size."""
    height, width = luma.shape[-2:]
    device = luma.device
    down, across = (torch.hann_window(side, device=device) for side in (height, width))
    window = torch.outer(down, across)
    spectrum: Tensor = torch.fft.fft2((luma - luma.mean()) * window).abs().square()
    y, x = (torch.fft.fftfreq(side, device=device).abs() for side in (height, width))
    return spectrum[..., torch.maximum(y[:, None], x) > 0.5 / SCALE].sum()
