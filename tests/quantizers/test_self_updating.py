"""`SelfUpdating`: the explicit steps, at the end of each training forward."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.factories import state
from vqprior import (
    ChannelsFirst,
    CodebookEMA,
    CodebookRevival,
    SelfUpdating,
    VectorQuantizer,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def make():
    quantizer = VectorQuantizer(4, 16)
    return SelfUpdating(quantizer, CodebookEMA(quantizer, decay=0.9), CodebookRevival(quantizer))


def test_equals_explicit_steps_in_order():
    automatic = make()
    quantizer, rules = copy.deepcopy((automatic.quantizer, list(automatic.rules)))
    for rule in rules:  # copied together, they belong together
        assert rule.codebooks == quantizer.codebooks
    for _ in range(5):
        x = torch.randn(100, 4)
        out, expected = automatic(x), quantizer(x)
        for rule in rules:
            rule.step(expected)
        exactly(out.quantized, expected.quantized)
        exactly(out.loss, expected.loss)
    exactly(state(automatic.quantizer), state(quantizer))
    exactly([state(rule) for rule in automatic.rules], [state(rule) for rule in rules])


def test_the_result_is_from_before_the_step():
    automatic, x = make(), torch.randn(100, 4)
    codes = automatic.quantizer.codebook.codes().detach().clone()
    out = automatic(x)
    exactly(out.quantized, codes[out.indices])
    assert (automatic.quantizer.codebook.codes() != codes).any()


def test_eval_encode_and_decode_step_nothing():
    automatic, x = make(), torch.randn(100, 4)
    before = state(automatic)
    indices = automatic.encode(x)
    automatic.decode(indices)
    automatic.eval()(x)
    exactly(state(automatic), before)


def test_statistics_travel_with_the_state_dict():
    automatic = make()
    automatic(torch.randn(100, 4))
    assert {"rules.0.counts_0", "rules.0.codes_0", "rules.1.uses_0"} <= set(automatic.state_dict())
    restored = make()
    restored.load_state_dict(automatic.state_dict())
    x = torch.randn(100, 4)
    exactly(restored(x).quantized, automatic(x).quantized)
    exactly(state(restored), state(automatic))


def test_training_by_gradient_survives_a_revival_in_between():
    """The rule writes to the codebook before the backward pass of the same call."""
    quantizer = VectorQuantizer(4, 16, unused_weight=0.0)
    quantizer.codebook.weight.data[1:] += 100
    automatic = SelfUpdating(quantizer, CodebookRevival(quantizer, patience=1.0))
    out = automatic(torch.randn(100, 4))
    assert (quantizer.codebook.weight[1:].abs() < 50).all()
    out.loss.backward()
    assert quantizer.codebook.weight.grad[0].abs().sum() > 0
    assert not quantizer.codebook.weight.grad[1:].any()


def test_it_wraps_wrappers_and_is_wrapped():
    quantizer = VectorQuantizer(4, 16)
    inside = ChannelsFirst(SelfUpdating(quantizer, CodebookEMA(quantizer)))
    before = state(inside)
    inside(torch.randn(2, 4, 8))
    assert (inside.state_dict()["quantizer.rules.0.counts_0"] != 1).any()
    outer = ChannelsFirst(VectorQuantizer(4, 16))
    outside = SelfUpdating(outer, CodebookEMA(outer))
    outside(torch.randn(2, 4, 8))
    assert (outside.rules[0].counts_0 != 1).any()
    assert before.keys() == inside.state_dict().keys()


def test_a_rule_of_another_quantizer_is_rejected():
    """It would train a codebook that the forward pass does not use."""
    message = (
        r"^`rules` must be built on `quantizer`, got a CodebookEMA of other codebooks\. Build it "
        r"on the quantizer that is passed here\.$"
    )
    other = VectorQuantizer(4, 16)
    with pytest.raises(ValueError, match=message):
        SelfUpdating(VectorQuantizer(4, 16), CodebookEMA(other))
