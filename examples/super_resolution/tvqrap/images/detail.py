"""How much an image holds that an image of a quarter the size cannot."""

import torch
from torch import Tensor

from tvqrap.models.assembly import SCALE


def detail_energy(luma: Tensor) -> Tensor:
    """The energy of ``(..., h, w)`` at frequencies that an image of a quarter the size lacks."""
    height, width = luma.shape[-2:]
    device = luma.device
    down, across = (torch.hann_window(side, device=device) for side in (height, width))
    window = torch.outer(down, across)
    spectrum: Tensor = torch.fft.fft2((luma - luma.mean()) * window).abs().square()
    y, x = (torch.fft.fftfreq(side, device=device).abs() for side in (height, width))
    return spectrum[..., torch.maximum(y[:, None], x) > 0.5 / SCALE].sum()
