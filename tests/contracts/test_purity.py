"""Law 2: a call changes no parameter and no buffer, and draws no random number in eval mode."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.contracts.factories import draw, every_quantizer, is_pure, quantizers_where, state


def check_that_nothing_changes(quantizer, call, argument):
    before, versions = state(quantizer), [p._version for p in quantizer.parameters()]
    call(argument)
    assert_close(state(quantizer), before, rtol=0, atol=0)
    # In-place writes of the same value break a later backward pass too.
    assert [p._version for p in quantizer.parameters()] == versions


@quantizers_where(is_pure)
def test_forward_changes_no_state_in_training(make):
    quantizer = make().train()
    check_that_nothing_changes(quantizer, quantizer, draw(quantizer))


@every_quantizer
def test_forward_changes_no_state_in_eval(make):
    quantizer = make().eval()
    check_that_nothing_changes(quantizer, quantizer, draw(quantizer))


@every_quantizer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_encode_and_decode_change_no_state(make, training):
    quantizer = make().train(training)
    x = draw(quantizer)
    check_that_nothing_changes(quantizer, quantizer.encode, x)
    check_that_nothing_changes(quantizer, quantizer.decode, quantizer.encode(x))


@every_quantizer
def test_the_input_is_not_written_to(make):
    quantizer = make()
    x = draw(quantizer)
    before = x.clone()
    quantizer(x)
    assert_close(x, before, rtol=0, atol=0)


@every_quantizer
def test_eval_draws_no_random_number(make):
    quantizer, rng = make().eval(), torch.get_rng_state()
    quantizer(draw(quantizer))
    quantizer.decode(quantizer.encode(draw(quantizer)))
    assert torch.equal(torch.get_rng_state(), rng)


@every_quantizer
def test_encode_builds_no_graph(make):
    quantizer = make()
    assert not quantizer.encode(draw(quantizer).requires_grad_()).requires_grad


@quantizers_where(is_pure)
def test_activation_checkpointing_changes_nothing(make):
    quantizer = make()
    x = draw(quantizer).requires_grad_()

    def call(x):
        out = quantizer(x)
        return out.quantized.square().sum() + out.loss

    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(call(x), x)
    torch.manual_seed(1)
    (actual,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False), x)
    assert_close(actual, expected, rtol=0, atol=0)
