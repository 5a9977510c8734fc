"""`ChannelsFirst` is a change of layout and nothing else."""

import pytest
import torch
from torch.testing import assert_close

from vqprior import ChannelsFirst, VectorQuantizer


@pytest.mark.parametrize("spatial", [(), (7,), (5, 3), (2, 3, 4), (0, 3)])
def test_equals_moving_the_features_by_hand(spatial):
    inner = VectorQuantizer(4, 16)
    quantizer = ChannelsFirst(inner)
    x, mask = torch.randn(2, 4, *spatial), torch.rand(2, *spatial) > 0.3
    out, expected = quantizer(x, mask), inner(x.movedim(1, -1), mask)
    assert_close(out.quantized, expected.quantized.movedim(-1, 1), rtol=0, atol=0)
    assert_close(out.indices, expected.indices, rtol=0, atol=0)
    assert_close(out.terms, expected.terms, rtol=0, atol=0)
    assert_close(vars(out.selections[0]), vars(expected.selections[0]), rtol=0, atol=0)
    assert_close(quantizer.encode(x, mask), out.indices, rtol=0, atol=0)
    assert_close(quantizer.decode(out.indices), out.quantized, rtol=0, atol=0)


def test_it_adds_no_state_of_its_own():
    quantizer = ChannelsFirst(VectorQuantizer(4, 16))
    assert list(quantizer.state_dict()) == ["quantizer.codebook.weight"]
    assert (quantizer.dim, quantizer.codebook_size, quantizer.num_codebooks) == (4, 16, 1)
    assert quantizer.bits_per_token == 4.0


@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (4,), (2, 5)])
def test_features_elsewhere_name_the_way_out(shape):
    message = (
        rf"^`x` must have shape \(b, 4, \*spatial\), got \({', '.join(map(str, shape))},?\)\. For "
        r"features in the last dimension, call the wrapped quantizer\.$"
    )
    with pytest.raises(ValueError, match=message):
        ChannelsFirst(VectorQuantizer(4, 16))(torch.randn(shape))


def test_a_mask_with_a_channel_dimension():
    with pytest.raises(ValueError, match=r"^`mask` must have shape \(2, 8\), got \(2, 1, 8\)\.$"):
        ChannelsFirst(VectorQuantizer(4, 16))(torch.randn(2, 4, 8), torch.ones(2, 1, 8) > 0)


def test_an_index_without_a_batch():
    message = (
        r"^`indices` must have a batch dimension, got \(\)\. For a single vector, call the wrapped "
        r"quantizer\.$"
    )
    with pytest.raises(ValueError, match=message):
        ChannelsFirst(VectorQuantizer(4, 16)).decode(torch.tensor(3))
