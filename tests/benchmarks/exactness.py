"""Compares the indices of the search with those of a search in double precision."""

import torch

from tests.benchmarks.timing import Measured, Settings
from vqprior.functional import nearest_indices

ROWS = 512  # of the matrix of distances, at once


def against_float64(settings: Settings, n: int, k: int, d: int, offset: int) -> Measured:
    """Measures the largest excess distance of the codes found, relative to the least distance.

    Tokens are far from all codes, where rounding changes the choice most often.
    """
    generator = torch.Generator().manual_seed(0)
    x, codes = (torch.randn(rows, d, generator=generator) + offset for rows in (n, k))
    x, codes = x.to(settings.device), codes.to(settings.device)
    found = nearest_indices(x, codes)
    exact = torch.cat([_exact(part, codes) for part in x.split(ROWS)])
    differ = (found != exact).nonzero().squeeze(1)
    ours, least = (
        (x[differ].double() - codes[choice[differ]].double()).square().sum(dim=1)
        for choice in (found, exact)
    )
    further = ((ours - least) / least).amax().item() if len(differ) else 0.0
    return Measured("of the distance", further, note=f"{len(differ)} of {n:,} indices differ")


def _exact(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    # Subtracts a common offset, which is exact in double precision and changes no distance.
    middle = codes.double().mean(dim=0)
    x, codes = x.double() - middle, codes.double() - middle
    return (codes.square().sum(dim=1) - 2 * x @ codes.T).argmin(dim=1)
