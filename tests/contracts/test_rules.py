"""The laws of ``UpdateRule`` for every rule and quantizer; masks and state are in other files."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import every_learned_quantizer, every_rule, state
from tests.contracts.layouts import draw, exactly
from tests.contracts.test_cost import train_step
from vqprior import FSQ, CodebookEMA, CodebookRevival


@every_learned_quantizer
@every_rule
def test_a_rule_refers_to_the_quantizer_without_owning_it(make, rule):
    quantizer = make()
    learner = rule(quantizer)
    assert not list(learner.parameters())
    assert not set(map(id, learner.modules())) & set(map(id, quantizer.modules()))
    unique = {id(codebook): codebook for codebook in quantizer.codebooks}
    assert [id(c) for c in learner.codebooks] == list(unique)


@every_learned_quantizer
@every_rule
def test_a_step_draws_no_global_random_number_and_builds_no_graph(make, rule):
    quantizer = make().eval()
    learner = rule(quantizer)
    out = quantizer(draw(quantizer).requires_grad_())
    rng = torch.get_rng_state()
    learner.step(out)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(buffer.requires_grad for buffer in learner.buffers())
    out.quantized.sum().backward()  # the result's own graph is untouched


@every_learned_quantizer
@every_rule
def test_statistics_keep_their_dtype(make, rule):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        quantizer = make().eval()
        both = nn.ModuleList([quantizer, rule(quantizer)]).to(dtype)
        before = {name: buffer.dtype for name, buffer in both[1].named_buffers()}
        both[1].step(quantizer(draw(quantizer, dtype=dtype)))
        assert set(before.values()) <= {torch.float32, torch.int64}
        assert {name: buffer.dtype for name, buffer in both[1].named_buffers()} == before
        assert all(codebook.codes().dtype == dtype for codebook in quantizer.codebooks)


@every_learned_quantizer
@every_rule
def test_statistics_are_float32_whatever_the_default_dtype(make, rule):
    quantizer = make()
    torch.set_default_dtype(torch.float64)
    try:
        learner = rule(quantizer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {b.dtype for b in learner.buffers()} <= {torch.float32, torch.int64}


def innermost(quantizer):
    """Removes wrappers around a quantizer that do not change its selections."""
    quantizer = getattr(quantizer, "texture_quantizer", quantizer)
    while hasattr(quantizer, "quantizer"):
        if len(quantizer.quantizer.codebooks) < len(quantizer.codebooks):
            break  # over scales
        quantizer = quantizer.quantizer
    return quantizer


@every_learned_quantizer
@every_rule
def test_a_rule_may_be_built_inside_and_fed_from_outside(make, rule):
    outside, inside = make().eval(), make().eval()
    inside.load_state_dict(outside.state_dict())
    x = draw(outside)
    rule(outside).step(outside(x))
    rule(innermost(inside)).step(inside(x))
    exactly(state(outside), state(inside))


@every_learned_quantizer
@every_rule
def test_autocast_changes_nothing_that_is_learned(make, rule):
    states = []
    for enabled in (False, True):
        torch.manual_seed(3)
        quantizer = make().eval()
        learner = rule(quantizer)
        for seed in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                learner.step(quantizer(draw(quantizer, seed=seed)))
        states.append(state(quantizer) | state(learner))
    exactly(states[1], states[0])


@every_learned_quantizer
def test_nothing_but_a_moving_average_moves_its_codebooks(make):
    """Whatever sets `requires_grad`, as steps of a GAN do, and whenever an optimizer was made."""
    quantizer, other = make().eval(), nn.Parameter(torch.zeros(()))
    early = torch.optim.AdamW([*quantizer.parameters(), other], lr=0.1, weight_decay=0.1)
    train_step(quantizer, draw(quantizer).requires_grad_())  # gradients for `early` to apply
    rule = CodebookEMA(quantizer)
    before = [codebook.codes().clone() for codebook in rule.codebooks]
    for model in (quantizer, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        model.requires_grad_(False).requires_grad_(True)
        late = torch.optim.AdamW([*model.parameters(), other], lr=0.1, weight_decay=0.1)
        train_step(model, draw(model).requires_grad_())
        early.step()
        late.step()
        own = {id(c): c for c in model.codebooks if c.can_be_set}.values()
        assert not any(codebook.codes().requires_grad for codebook in own)
        exactly([codebook.codes() for codebook in own], before)


@every_learned_quantizer
def test_codes_that_were_set_stay_set(make):
    """A moving average continues from codes set by others as a new one would."""
    old, fresh = make().eval(), make().eval()
    fresh.load_state_dict(old.state_dict())
    rule = CodebookEMA(old, decay=0.9)
    rule.step(old(draw(old)))
    for quantizer in (old, fresh):
        torch.manual_seed(8)
        for codebook in {id(c): c for c in quantizer.codebooks}.values():
            everywhere = torch.ones(codebook.num_codes) > 0
            codebook.set_codes_(torch.randn(codebook.num_codes, codebook.dim), everywhere)
    fresh_rule = CodebookEMA(fresh, decay=0.9)
    for seed in range(1, 3):
        rule.step(old(draw(old, seed=seed)))
        fresh_rule.step(fresh(draw(fresh, seed=seed)))
        exactly([c.codes() for c in old.codebooks], [c.codes() for c in fresh.codebooks])


@every_learned_quantizer
@every_rule
def test_a_result_of_another_quantizer(make, rule):
    quantizer = make().eval()
    learner = rule(quantizer)
    out = dataclasses.replace(quantizer(draw(quantizer)), selections=())
    message = re.escape(
        f"`out` must hold {len(quantizer.codebooks)} selections, one for each codebook of this "
        "rule's quantizer, got 0. Pass the result of the quantizer that the rule was built on."
    )
    with pytest.raises(ValueError, match=message):
        learner.step(out)


@every_learned_quantizer
@every_rule
def test_micro_batches_are_one_step(make, rule):
    """The parts of a batch, stepped together, do what the whole batch does."""
    whole, parts = make().eval(), make().eval()
    parts.load_state_dict(whole.state_dict())
    learners = rule(whole), rule(parts)
    for seed in range(3):
        x = draw(whole, seed=seed)
        learners[0].step(whole(x))
        learners[1].step(*(parts(part) for part in x.split(1)))
        learners[1].step()  # nothing changes nothing
    # Sums are those of the same numbers in another order.
    assert_close(state(parts), state(whole))
    assert_close(state(learners[1]), state(learners[0]))


@pytest.mark.parametrize("rule", [CodebookEMA, CodebookRevival])
def test_a_quantizer_without_codebooks(rule):
    message = (
        r"^`quantizer` must have a codebook that can learn, got FSQ without one\. Train it "
        r"without rules\.$"
    )
    with pytest.raises(ValueError, match=message):
        rule(FSQ([5, 5]))
