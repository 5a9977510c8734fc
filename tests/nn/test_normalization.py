"""ChannelNorm and group_norm against their formulas."""

import pytest
import torch
from torch.testing import assert_close

from vqprior.nn import ChannelNorm, group_norm


def test_channel_norm_is_its_formula(dtype):
    norm = ChannelNorm(5, eps=0.1)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm = norm.to(dtype)
    x = torch.randn(2, 5, 3, 4).to(dtype)
    wide = x.double()
    mean = wide.mean(dim=1, keepdim=True)
    variance = (wide - mean).square().mean(dim=1, keepdim=True)
    weight, bias = (p.detach().double().view(1, 5, 1, 1) for p in (norm.weight, norm.bias))
    expected = (wide - mean) / (variance + 0.1).sqrt() * weight + bias
    assert_close(norm(x), expected.to(dtype))


def test_channel_norm_of_a_tile_is_a_tile_of_it():
    norm, x = ChannelNorm(8), torch.randn(1, 8, 16, 16)
    assert_close(norm(x[:, :, 3:9, 2:7]), norm(x)[:, :, 3:9, 2:7], rtol=0, atol=0)


def test_channel_norm_survives_large_offsets():
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    shifted = (x + 1000).float()  # keeps 13 bits of x
    assert_close(ChannelNorm(64)(shifted), ChannelNorm(64).double()(x).float(), rtol=0, atol=1e-3)


def test_channel_norm_shows_its_arguments():
    assert repr(ChannelNorm(5, eps=0.1)) == "ChannelNorm(5, eps=0.1)"


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (12, 4), (32, 32), (48, 16), (96, 32), (128, 32)]
)
def test_group_norm_has_as_many_groups_as_divide(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels, norm.eps) == (groups, channels, 1e-6)
    x = torch.randn(2, channels, 3, 5)
    grouped = x.view(2, groups, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    assert_close(norm(x), ((grouped - mean) / (variance + 1e-6).sqrt()).view_as(x))


def test_rejects():
    with pytest.raises(ValueError, match=r"`channels` must be at least 1, got 0\."):
        ChannelNorm(0)
    with pytest.raises(ValueError, match=r"`channels` must be at least 1, got 0\."):
        group_norm(0)
    with pytest.raises(ValueError, match=r"`eps` must be greater than 0, got 0\.0\."):
        ChannelNorm(4, eps=0.0)
