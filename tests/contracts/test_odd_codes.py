"""A code that is far away or not finite costs no other code anything, and revival replaces it."""

import pytest
import torch

from tests.contracts.factories import quantizers_where
from tests.contracts.layouts import draw, exactly, has
from tests.contracts.traits import learned_by_rules
from vqprior import (
    NormalizedCodebook,
    RequireFinite,
    VectorQuantizer,
    default_rules,
    initialize_codebooks_,
)

ODD = 1  # its index in every codebook
BROKEN = [torch.nan, torch.inf]


def spoil_(quantizer, value):
    for codebook in quantizer.codebooks:
        where = torch.arange(codebook.num_codes) == ODD
        codes = codebook.codes().detach()
        codebook.set_codes_(torch.where(where.unsqueeze(1), value, codes), where)


def takes_odd_codes(quantizer):
    """Codes of unit length are never far away, and one wrapper refuses what is broken."""
    return not has(quantizer, (NormalizedCodebook, RequireFinite))


def chooses_one_index(quantizer):
    return len(quantizer.codebooks) == quantizer.num_codebooks == 1


def compares_distances(quantizer):
    """With other metrics, a code far away is not far from everything."""
    return {m.metric for m in quantizer.modules() if isinstance(m, VectorQuantizer)} == {
        "euclidean"
    }


def check_that_others_are_chosen_as_before(quantizer, value):
    x = draw(quantizer, (200,))
    initialize_codebooks_(quantizer, x, method="sample")
    before = quantizer.encode(x)
    spoil_(quantizer, value)
    after = quantizer.encode(x)
    assert (after != ODD).all()
    exactly(after[before != ODD], before[before != ODD])


@quantizers_where(learned_by_rules, takes_odd_codes, chooses_one_index)
@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_code_is_never_chosen(make, value):
    check_that_others_are_chosen_as_before(make().eval(), value)


@quantizers_where(learned_by_rules, takes_odd_codes, chooses_one_index, compares_distances)
@pytest.mark.parametrize("value", [1e5, -1e9])
def test_a_distant_code_changes_no_choice(make, value):
    check_that_others_are_chosen_as_before(make().eval(), value)


@quantizers_where(learned_by_rules, takes_odd_codes)
@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_code_reaches_no_result_and_no_gradient(make, value):
    quantizer = make().eval()
    spoil_(quantizer, value)
    x = draw(quantizer).requires_grad_()
    out = quantizer(x)
    assert all((selection.indices != ODD).all() for selection in out.selections)
    (out.quantized.square().sum() + out.loss).backward()
    gradients = [x.grad, *(p.grad for p in quantizer.parameters() if p.grad is not None)]
    assert all(values.isfinite().all() for values in (out.quantized, out.loss, *gradients))


@quantizers_where(learned_by_rules, takes_odd_codes)
def test_default_rules_replace_a_broken_code_at_the_next_step(make):
    quantizer = make().eval()
    rules = default_rules(quantizer)
    spoil_(quantizer, torch.nan)
    rules.step(quantizer(draw(quantizer)))
    assert all(codebook.codes().isfinite().all() for codebook in quantizer.codebooks)
