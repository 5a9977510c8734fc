"""A feature map whose width happens to equal `dim` gets a warning, once, and nothing else does."""

import warnings

import pytest
import torch
from torch import nn

from tests.contracts.factories import DIM, multi_scale, projected, quantizers_where, vq
from tests.contracts.layouts import GivenStructure, feature_axis, is_of_tokens
from vqprior import ChannelsFirst, ProjectedQuantizer, ResidualQuantizer, TextureQuantizer

pytestmark = pytest.mark.filterwarnings("error")
takes_tokens = quantizers_where(is_of_tokens, lambda q: feature_axis(q) == -1 and q.dim > 1)


def maps(dim):
    """Feature maps of width `dim`, as an unwrapped quantizer would get them."""
    return torch.randn(2, dim, 5, dim), torch.randn(2, 3, dim, dim)


@takes_tokens
def test_a_map_that_is_as_wide_as_the_features(make):
    quantizer = make()
    for x in maps(quantizer.dim):
        message = r"^`x` of shape \(2, .*\) looks like feature maps \(b, d, h, w\), but features "
        with pytest.warns(UserWarning, match=message):
            quantizer(x)
        with pytest.warns(UserWarning, match="`ChannelsFirst`"):
            quantizer.eval()(x)


@takes_tokens
def test_what_cannot_be_meant_as_a_map_passes(make):
    quantizer = make()
    d = quantizer.dim
    for shape in [(d, d), (2, d, d), (2, d, 5 * d, d, d), (2, d + 1, d + 2, d)]:
        quantizer(torch.randn(shape))
    for x in maps(d):
        quantizer(x.flatten(1, 2))  # the way out for features that do come last
    moved = torch.randn(2, d, 5, d).movedim(1, -1)  # by hand
    if isinstance(quantizer, GivenStructure):
        quantizer.texture_quantizer(moved, moved.clone())
    else:
        quantizer(moved)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_map_through_channels_first_passes_at_any_depth(memory_format):
    x = torch.randn(2, DIM, DIM, DIM).to(memory_format=memory_format)
    wide = ProjectedQuantizer(
        ResidualQuantizer([vq(d=8), vq(d=8)]), nn.Linear(DIM, 8), nn.Linear(8, DIM)
    )
    for inner in (vq(), ResidualQuantizer([vq(), projected(vq())]), wide):
        ChannelsFirst(inner)(x)
        TextureQuantizer(ChannelsFirst(inner))(x, x.clone())
    multi_scale(vq(), scales=(1, DIM))(x)
    ChannelsFirst(multi_scale(vq(), scales=(1, DIM)))(x)


def test_the_width_of_a_projection_is_not_looked_at():
    ProjectedQuantizer(vq(d=8), nn.Linear(16, 8), nn.Linear(8, 16))(torch.randn(2, 8, 8, 16))


def test_it_is_shown_once_for_a_line_of_code():
    quantizer, (x, _) = vq(), maps(DIM)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            quantizer(x)
    assert [warning.filename for warning in seen] == [__file__]
