"""The highest rates of the machine, and the share of them that the search reaches."""

import numpy as np
import torch

from tests.benchmarks import sides
from tests.benchmarks.timing import Measured, Settings, alternate, summarize
from vqprior.functional import nearest_indices

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices of a product at the full rate
COPIED = 256 << 20  # bytes, more than any cache holds


def product_rate(settings: Settings) -> Measured:
    """Measures billions of additions and multiplications per second in a large product."""
    product, operations = _product(settings)
    seconds = _alone(product, settings)
    return summarize(operations / seconds / 1e9, "GFLOP/s")


def copy_rate(settings: Settings) -> Measured:
    """Measures billions of bytes per second, read and written, in a large copy."""
    count = COPIED // (64 if settings.quick else 1) // 4
    source = torch.ones(count, device=settings.device)
    target = torch.zeros_like(source)
    seconds = _alone(lambda: target.copy_(source), settings)
    return summarize(2 * 4 * count / seconds / 1e9, "GB/s")


def share_of_product_rate(settings: Settings, n: int, k: int, d: int) -> Measured:
    """Measures the rate of the product in the search relative to that of a large product.

    Each round measures both; all of the search's time counts.
    """
    data = sides.tokens(settings.device, n, k, d)
    x, codes = data.x[0], data.codes[0]
    product, operations = _product(settings)

    def search() -> torch.Tensor:
        return nearest_indices(x, codes)

    search()
    seconds = alternate(search, product, settings)
    rates = np.array([2 * n * k * d, operations]) / seconds
    return summarize(100 * rates[:, 0] / rates[:, 1], "%", seconds)


def _product(settings: Settings):
    side = 256 if settings.quick else SIDE[settings.device]
    left, right = torch.randn(2, side, side, device=settings.device)
    out = torch.mm(left, right)
    return lambda: torch.mm(left, right, out=out), 2 * side**3


def _alone(call, settings: Settings) -> np.ndarray:
    call()
    return alternate(call, lambda: None, settings)[:, 0]
