"""The laws of ``UpdateRule``, for every rule and every quantizer (masks and state apart)."""

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import draw, every_learned_quantizer, every_rule, state


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


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_learned_quantizer
def test_statistics_keep_their_dtype(make, rule, dtype):
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
    """What the wrappers of one quantizer are around."""
    quantizer = getattr(quantizer, "texture_quantizer", quantizer)
    while hasattr(quantizer, "quantizer"):
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
    assert_close(state(outside), state(inside), rtol=0, atol=0)


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


class Codeless(nn.Module):
    codebooks = ()


@every_rule
def test_a_quantizer_without_codebooks(rule):
    message = (
        r"^`quantizer` must have a codebook that can learn, got Codeless without one\. Train it "
        r"without rules\.$"
    )
    with pytest.raises(ValueError, match=message):
        rule(Codeless())
