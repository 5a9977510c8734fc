"""Results lie in memory as the input does, so `view` works behind a quantizer as before it."""

import torch

from tests.contracts.factories import quantizers_where, vq
from tests.contracts.layouts import GivenStructure, draw, feature_axis, map_size
from vqprior import ChannelsFirst, TextureQuantizer


def takes_one_tensor(quantizer):
    return not isinstance(quantizer, GivenStructure)


@quantizers_where(takes_one_tensor)
def test_contiguous_stays_contiguous(make):
    quantizer = make()
    x = draw(quantizer, (3,) if map_size(quantizer) else (3, 5, 6)).contiguous()
    out = quantizer(x)
    for result in (out.quantized, quantizer.decode(out.indices), out.indices):
        assert result.is_contiguous()
    assert quantizer.quantize_as(x, out.indices).quantized.is_contiguous()


@quantizers_where(takes_one_tensor, lambda q: feature_axis(q) == 1)
def test_channels_last_stays_channels_last(make):
    quantizer = make()
    x = draw(quantizer, (3,) if map_size(quantizer) else (3, 5, 6))
    x = x.contiguous(memory_format=torch.channels_last)
    assert quantizer(x).quantized.is_contiguous(memory_format=torch.channels_last)


def test_texture_follows_the_structure():
    quantizer, x = TextureQuantizer(ChannelsFirst(vq())), torch.randn(3, 4, 5, 6)
    assert quantizer(x, x.clone()).quantized.is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    out = quantizer(last, last.clone())
    assert out.quantized.is_contiguous(memory_format=torch.channels_last)
    assert quantizer.decode(out.indices, x).is_contiguous()
