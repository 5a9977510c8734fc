import torch
from torch.testing import assert_close

from vqprior.functional._random import counter_gumbel


def test_noise_in_float32_is_that_in_float64_with_its_tail():
    """Uniform numbers of 24 bits would end at 16.6, and cut off what is rare and large."""
    counter = torch.arange(300_000)
    wide = counter_gumbel(counter, torch.float64)
    assert_close(counter_gumbel(counter, torch.float32), wide.float(), rtol=1e-5, atol=1e-5)
    assert wide.max() > 11
    assert (wide.mean() - 0.5772).abs() < 4 * 1.2825 / len(counter) ** 0.5
    assert counter_gumbel(torch.zeros(1, dtype=torch.int64), torch.float32).isfinite().all()
