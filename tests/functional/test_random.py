import torch
from torch.testing import assert_close

from vqprior.functional._random import counter_gumbel


def test_noise_in_float32_is_that_in_float64_with_its_tail():
    """Uniform numbers of 24 bits would end at 16.6, and cut off what is rare and large."""
    counter = torch.arange(300_000)
    wide = counter_gumbel(counter, torch.float64)
    narrow = counter_gumbel(counter, torch.float32)
    assert_close(narrow[wide > -1], wide[wide > -1].float(), rtol=1e-5, atol=1e-5)
    assert_close(narrow, wide.float(), rtol=0, atol=0.1)
    assert wide.max() > 44  # of counter 0, whose integer is 0
    assert (wide.mean() - 0.5772).abs() < 4 * 1.2825 / len(counter) ** 0.5
