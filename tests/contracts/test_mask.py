"""Law 4: masked and non-finite tokens contribute nothing, whatever they hold."""

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.factories import (
    every_learned_quantizer,
    every_quantizer,
    every_rule,
    quantizers_where,
    state,
)
from tests.contracts.layouts import (
    arrange,
    draw,
    draw_mask,
    exactly,
    features_last,
    fill,
    is_of_tokens,
    tokens,
)
from tests.contracts.traits import skips_what_is_not_finite

BROKEN = (torch.nan, torch.inf, -torch.inf)
GARBAGE = (*BROKEN, 1e38, 0.0)


def result(quantizer, x, mask):
    """The result of one call, and its gradients without those of masked tokens."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    out = quantizer(x, mask)
    mask = torch.ones(tokens(quantizer), dtype=torch.bool) if mask is None else mask
    (out.loss + features_last(quantizer, out.quantized)[mask].square().sum()).backward()
    gradients = {n: p.grad for n, p in quantizer.named_parameters() if p.grad is not None}
    return out, x.grad, gradients


def same_results(actual, expected):
    (out, *gradients), (expected, *expected_gradients) = actual, expected
    exactly(out.terms, expected.terms)
    exactly(out.indices, expected.indices)
    exactly(gradients, expected_gradients)
    exactly([vars(s) for s in out.selections], [vars(s) for s in expected.selections])


@every_quantizer
def test_what_masked_tokens_hold_does_not_matter(make):
    quantizer = make().eval()
    x, mask = draw(quantizer), draw_mask(quantizer)
    expected = result(quantizer, x, mask)
    assert not features_last(quantizer, expected[1])[~mask].any()
    for value in GARBAGE:
        same_results(result(quantizer, fill(quantizer, x, ~mask, value), mask), expected)


@quantizers_where(skips_what_is_not_finite, is_of_tokens)
def test_a_broken_token_keeps_no_index_that_it_is_given(make):
    quantizer = make().eval()
    x, mask = draw(quantizer), draw_mask(quantizer)
    indices = quantizer.encode(x)
    out = quantizer.quantize_as(fill(quantizer, x, ~mask, torch.nan), indices)
    assert (out.indices[~mask] == -1).all()
    exactly(out.indices[mask], indices[mask])


@quantizers_where(skips_what_is_not_finite)
def test_a_token_with_one_non_finite_feature_is_masked(make):
    """In losses, and in the selections that rules and initialization use."""
    quantizer = make().eval()
    x, mask = draw(quantizer), draw_mask(quantizer)
    expected = quantizer(x, mask)
    for value in BROKEN:
        broken = features_last(quantizer, x).clone()
        broken[..., 0][~mask] = value  # torch 2.6 miscounts the dimensions of `[~mask, 0]`
        broken = arrange(quantizer, broken)
        out = quantizer(broken)
        exactly(out.terms, expected.terms)
        exactly(out.indices, expected.indices)
        exactly([vars(s) for s in out.selections], [vars(s) for s in expected.selections])
        exactly(quantizer.encode(broken), expected.indices)


@quantizers_where(is_of_tokens)
def test_masked_tokens_come_out_as_decoded_nothing(make):
    quantizer = make().eval()
    mask = draw_mask(quantizer)
    out = quantizer(draw(quantizer), mask)
    assert (out.indices[~mask] == -1).all()
    assert (out.indices[mask] >= 0).all()
    exactly(out.quantized, quantizer.decode(out.indices))
    for selection in out.selections:
        exactly(selection.mask, mask)
        assert not selection.inputs[~mask].any()
        assert not selection.codes[~mask].any()


@every_quantizer
def test_loss_is_that_of_the_counted_samples_alone(make):
    quantizer = make().eval()
    x = draw(quantizer)
    kept = torch.arange(32) % 3 > 0
    mask = torch.zeros(tokens(quantizer)) > 0
    mask[kept] = True
    alone = quantizer(arrange(quantizer, features_last(quantizer, x)[kept]))
    masked = quantizer(x, mask)
    assert_close(masked.terms, alone.terms)
    exactly(masked.indices[kept], alone.indices)
    assert (masked.indices[~kept] == -1).all()


@every_quantizer
def test_an_all_true_mask_is_no_mask(make):
    quantizer = make().eval()
    x = draw(quantizer)
    actual = result(quantizer, x, torch.ones(tokens(quantizer), dtype=torch.bool))
    expected = result(quantizer, x, None)
    same_results(actual, expected)
    exactly(actual[0].quantized, expected[0].quantized)


def without_a_token(quantizer):
    """Batches and masks without a token that counts."""
    x = draw(quantizer)
    yield x, torch.zeros(tokens(quantizer)) > 0
    yield draw(quantizer, (0,)), None
    if skips_what_is_not_finite(quantizer):
        yield torch.full_like(x, torch.nan), None


@every_quantizer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_a_token_the_loss_is_0_and_gradients_are_finite(make, training):
    quantizer = make().train(training)
    before = state(quantizer)
    for x, mask in without_a_token(quantizer):
        quantizer.zero_grad()
        out = quantizer(x.requires_grad_(), mask)
        exactly(out.loss, torch.zeros(()))
        (out.loss + out.quantized.nan_to_num().sum()).backward()
        assert x.grad.isfinite().all()
        gradients = [p.grad for p in quantizer.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        for codebook in quantizer.codebooks:
            assert all(p.grad is None or not p.grad.any() for p in codebook.parameters())
        exactly(state(quantizer), before)  # rules inside do not move either


@every_learned_quantizer
@every_rule
def test_rules_learn_from_counted_tokens_alone(make, rule):
    states = []
    for value in (None, torch.nan, torch.inf, 1e38):
        torch.manual_seed(0)
        quantizer = make().eval()
        learner, mask = rule(quantizer), draw_mask(quantizer)
        for seed in range(2):
            x = draw(quantizer, seed=seed)
            x = x if value is None else fill(quantizer, x, ~mask, value)
            learner.step(quantizer(x, mask))
        states.append(state(quantizer) | state(learner))
    for spoiled in states[1:]:
        exactly(spoiled, states[0])


@every_learned_quantizer
@every_rule
def test_rules_do_not_move_without_a_token(make, rule):
    quantizer = make().eval()
    learner = rule(quantizer)
    learner.step(quantizer(draw(quantizer)))
    before = state(quantizer) | state(learner)
    for inputs in without_a_token(quantizer):
        learner.step(quantizer(*inputs))
        exactly(state(quantizer) | state(learner), before)
