"""Law 4: masked and non-finite tokens contribute nothing, whatever they hold."""

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.factories import (
    arrange,
    draw,
    every_learned_quantizer,
    every_quantizer,
    every_rule,
    features_last,
    quantizers_where,
    skips_what_is_not_finite,
    state,
)

MASK = torch.tensor([True, False, True, True, False, True, False, True] * 4)
GARBAGE = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "huge": 1e38, "zero": 0.0}


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def spoiled(quantizer, x, value):
    x = features_last(quantizer, x).clone()
    x[~MASK] = value
    return arrange(quantizer, x)


def result(quantizer, x, mask):
    """The result of one call, and the gradients of all it holds but the masked tokens."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    out = quantizer(x, mask)
    (out.loss + features_last(quantizer, out.quantized)[mask].square().sum()).backward()
    gradients = {n: p.grad for n, p in quantizer.named_parameters() if p.grad is not None}
    return out, x.grad, gradients


@every_quantizer
@pytest.mark.parametrize("value", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_masked_tokens_hold_does_not_matter(make, value):
    quantizer = make().eval()
    x = draw(quantizer)
    expected, expected_grad, expected_params = result(quantizer, x, MASK)
    actual, grad, params = result(quantizer, spoiled(quantizer, x, value), MASK)
    exactly(actual.loss, expected.loss)
    exactly(actual.terms, expected.terms)
    exactly(actual.indices, expected.indices)
    for ours, theirs in zip(actual.selections, expected.selections, strict=True):
        exactly(vars(ours), vars(theirs))
        exactly(ours.mask, MASK)
    exactly(params, expected_params)
    exactly(grad, expected_grad)
    assert not features_last(quantizer, grad)[~MASK].any()


@quantizers_where(skips_what_is_not_finite)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_a_token_with_one_non_finite_feature_is_masked(make, value):
    quantizer = make().eval()
    x = draw(quantizer)
    expected = quantizer(x, MASK)
    broken = features_last(quantizer, x).clone()
    broken[~MASK, 0] = value
    out = quantizer(arrange(quantizer, broken))
    exactly(out.loss, expected.loss)
    exactly(out.indices, expected.indices)
    exactly(quantizer.encode(arrange(quantizer, broken)), expected.indices)


@every_quantizer
def test_masked_tokens_come_out_as_decoded_nothing(make):
    quantizer = make().eval()
    out = quantizer(draw(quantizer), MASK)
    assert (out.indices[~MASK] == -1).all()
    assert (out.indices[MASK] >= 0).all()
    exactly(out.quantized, quantizer.decode(out.indices))
    for selection in out.selections:
        assert not selection.inputs[~MASK].any()
        assert not selection.codes[~MASK].any()


@every_quantizer
def test_loss_is_that_of_the_counted_tokens_alone(make):
    quantizer = make().eval()
    x = draw(quantizer)
    alone = quantizer(arrange(quantizer, features_last(quantizer, x)[MASK]))
    masked = quantizer(x, MASK)
    assert_close(masked.terms, alone.terms)
    exactly(masked.indices[MASK], alone.indices)


@every_quantizer
def test_an_all_true_mask_is_no_mask(make):
    quantizer = make().eval()
    x = draw(quantizer)
    with_mask, without = quantizer(x, torch.ones(32, dtype=torch.bool)), quantizer(x)
    exactly(with_mask.quantized, without.quantized)
    exactly(with_mask.indices, without.indices)
    exactly(with_mask.terms, without.terms)


@every_quantizer
@pytest.mark.parametrize("kind", ["all-masked", "empty", "all-nan"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_a_token_the_loss_is_0_and_gradients_are_finite(make, kind, training):
    quantizer = make().train(training)
    if kind == "all-nan" and not skips_what_is_not_finite(quantizer):
        return
    before = state(quantizer)
    x = draw(quantizer, (0 if kind == "empty" else 32,))
    x = torch.full_like(x, torch.nan) if kind == "all-nan" else x
    x.requires_grad_()
    mask = torch.zeros(x.shape[0], dtype=torch.bool) if kind == "all-masked" else None
    out = quantizer(x, mask)
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
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38], ids=str)
def test_rules_learn_from_counted_tokens_alone(make, rule, value):
    states = []
    for spoil in (False, True):
        torch.manual_seed(0)
        quantizer = make().eval()
        learner = rule(quantizer)
        for seed in range(2):
            x = draw(quantizer, seed=seed)
            x = spoiled(quantizer, x, value) if spoil else x
            learner.step(quantizer(x, MASK))
        states.append(state(quantizer) | state(learner))
    exactly(states[0], states[1])


@every_learned_quantizer
@every_rule
@pytest.mark.parametrize("kind", ["all-masked", "empty", "all-nan"])
def test_rules_do_not_move_without_a_token(make, rule, kind):
    quantizer = make().eval()
    if kind == "all-nan" and not skips_what_is_not_finite(quantizer):
        return
    learner = rule(quantizer)
    learner.step(quantizer(draw(quantizer)))
    before = state(quantizer) | state(learner)
    x = draw(quantizer, (0 if kind == "empty" else 32,))
    x = torch.full_like(x, torch.nan) if kind == "all-nan" else x
    mask = torch.zeros(x.shape[0], dtype=torch.bool) if kind == "all-masked" else None
    learner.step(quantizer(x, mask))
    exactly(state(quantizer) | state(learner), before)
