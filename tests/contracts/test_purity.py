"""Law 2: a call changes no parameter and no buffer, and draws no random number in eval mode."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.contracts.factories import every_quantizer, quantizers_where, state
from tests.contracts.layouts import draw, draw_mask, exactly
from tests.contracts.traits import is_pure, ranks_codes

every_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def calls(quantizer):
    """All methods that take features or indices."""
    x, mask = draw(quantizer), draw_mask(quantizer)
    indices = quantizer.encode(x)
    yield lambda: quantizer.encode(x, mask)
    yield lambda: quantizer.decode(indices)
    yield lambda: quantizer.quantize_as(x, indices)
    if ranks_codes(quantizer):
        yield lambda: quantizer.logits(x)
        yield lambda: quantizer.logits(x, indices=indices)
    if is_pure(quantizer):
        yield lambda: quantizer(x)
        yield lambda: quantizer(x, mask)


@every_quantizer
@every_mode
def test_no_call_changes_state(make, training):
    quantizer = make().train(training)
    before, versions = state(quantizer), [p._version for p in quantizer.parameters()]
    for call in calls(quantizer):
        call()
        exactly(state(quantizer), before)
        # Writing the same value in place also breaks a later backward pass.
        assert [p._version for p in quantizer.parameters()] == versions


@every_quantizer
@every_mode
def test_no_result_shares_memory_with_the_state(make, training):
    quantizer = make().train(training)
    owned = {
        t.untyped_storage().data_ptr() for t in (*quantizer.parameters(), *quantizer.buffers())
    }
    with torch.no_grad():
        for call in calls(quantizer):
            results = tree_leaves(call())
            assert not owned & {result.untyped_storage().data_ptr() for result in results}


@every_quantizer
def test_the_input_is_not_written_to(make):
    quantizer = make()
    x = draw(quantizer)
    before = x.clone()
    quantizer(x)
    exactly(x, before)


@every_quantizer
def test_eval_draws_no_random_number(make):
    quantizer, rng = make().eval(), torch.get_rng_state()
    for call in calls(quantizer):
        call()
    assert torch.equal(torch.get_rng_state(), rng)


@every_quantizer
def test_encode_builds_no_graph(make):
    quantizer = make()
    assert not quantizer.encode(draw(quantizer).requires_grad_()).requires_grad


@quantizers_where(is_pure)
def test_activation_checkpointing_changes_nothing(make):
    quantizer = make()
    x = draw(quantizer).requires_grad_()
    learned = [x, *(p for p in quantizer.parameters() if p.requires_grad)]

    def call(x):
        out = quantizer(x)
        return out.quantized.square().sum() + out.loss

    torch.manual_seed(1)
    expected = torch.autograd.grad(call(x), learned, allow_unused=True)
    torch.manual_seed(1)
    recomputed = checkpoint(call, x, use_reentrant=False)
    actual = torch.autograd.grad(recomputed, learned, allow_unused=True)
    assert_close(actual, expected, rtol=0, atol=0)
