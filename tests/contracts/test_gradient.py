"""Law 3: gradients of the estimator, the identity by default, and of all losses."""

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.factories import (
    RULES,
    every_quantizer,
    quantizers_where,
    vq,
)
from tests.contracts.layouts import (
    arrange,
    before_quantization,
    draw,
    exactly,
    features_last,
    has,
)
from tests.contracts.traits import estimates_straight_through, estimates_through_indices
from vqprior import FSQ, EmbeddingCodebook, ProjectedQuantizer, TransformedCodebook, VectorQuantizer
from vqprior.functional import (
    commitment_loss,
    distance_cross_entropy,
    entropy_loss,
    gram_loss,
    index_cross_entropy,
    symmetric_vq_loss,
)


def has_term(name, *, of_one_table=False):
    """Quantizers with this loss term; if asked, with one codebook only, in the input's space."""

    def applies(quantizer):
        tables = [isinstance(codebook, EmbeddingCodebook) for codebook in quantizer.codebooks]
        only = tables == [True] and not has(quantizer, ProjectedQuantizer)
        return (only or not of_one_table) and name in quantizer.eval()(draw(quantizer)).terms

    return quantizers_where(applies)


@quantizers_where(estimates_straight_through)
def test_gradient_of_quantized_is_that_of_what_was_quantized(make):
    quantizer = make().eval()
    x = draw(quantizer, (6, 5)).requires_grad_()
    weight = torch.randn(x.shape)
    (expected,) = torch.autograd.grad((weight * before_quantization(quantizer, x)).sum(), x)
    (actual,) = torch.autograd.grad((weight * quantizer(x).quantized).sum(), x)
    assert_close(actual, expected)


@quantizers_where(lambda q: not estimates_through_indices(q))
def test_gradient_of_quantized_does_not_reach_the_codebook(make):
    quantizer = make()
    quantizer(draw(quantizer).requires_grad_()).quantized.sum().backward()
    for codebook in quantizer.codebooks:
        assert all(p.grad is None or not p.grad.any() for p in codebook.parameters())


@has_term("commitment")
def test_commitment_gradient_is_alive_in_every_feature(make):
    quantizer = make()
    x = draw(quantizer, (64,)).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(x).terms["commitment"], x)
    assert gradient.isfinite().all()
    alive = (features_last(quantizer, gradient) != 0).flatten(0, -2).any(dim=0)
    assert alive.all() or (has(quantizer, FSQ) and alive.sum() >= quantizer.dim - 1)


@has_term("commitment", of_one_table=True)
def test_commitment_pulls_toward_the_code_that_was_chosen(make):
    quantizer = make()
    x = draw(quantizer, (6,)).requires_grad_()
    out = quantizer(x)
    (selection,) = out.selections
    difference = (selection.inputs - selection.codes).detach()
    (gain,) = torch.autograd.grad(before_quantization(quantizer, x).sum(), x)
    # 0.25 times the derivative of a mean square, through the modules before the codebook.
    expected = 0.25 * 2 * arrange(quantizer, difference) / difference.numel() * gain
    assert_close(torch.autograd.grad(out.loss, x)[0], expected)


@has_term("codebook", of_one_table=True)
def test_chosen_codes_learn_from_one_term_and_unused_ones_from_another(make):
    quantizer = make()
    out = quantizer(draw(quantizer, (5,)))
    (codebook,), (selection,) = quantizer.codebooks, out.selections
    chosen = torch.zeros(codebook.num_codes, dtype=torch.bool)
    chosen[selection.indices] = True
    (weight,) = codebook.parameters()
    for term, rows in (("codebook", chosen), ("unused", ~chosen)):
        (gradient,) = torch.autograd.grad(out.terms[term], weight, retain_graph=True)
        assert_close((gradient != 0).any(dim=1), rows)


@every_quantizer
def test_a_term_exists_only_if_it_can_act(make):
    quantizer = make().requires_grad_(requires_grad=False)
    assert "codebook" not in quantizer(draw(quantizer)).terms


def learns_by_gradient(quantizer):
    """Whether every trainable parameter has a loss, that is, no weight was set to 0."""
    weights = [m.codebook_weight for m in quantizer.modules() if isinstance(m, VectorQuantizer)]
    return 0.0 not in weights and any(p.requires_grad for p in quantizer.parameters())


@quantizers_where(learns_by_gradient)
def test_one_step_reaches_every_parameter_whether_or_not_the_input_has_a_gradient(make):
    found = []
    for requires_grad in (True, False):
        torch.manual_seed(3)
        quantizer = make().train()
        torch.manual_seed(5)  # of dropout and sampling
        out = quantizer(draw(quantizer).requires_grad_(requires_grad))
        (out.quantized.square().sum() + out.loss).backward()
        found.append({n: p.grad for n, p in quantizer.named_parameters() if p.requires_grad})
    assert_close(found[1], found[0])  # not exactly: gradients are summed in another order
    assert all(gradient is not None and gradient.any() for gradient in found[0].values())


def every_loss(out):
    """Everything in a result that has a gradient."""
    losses = [commitment_loss, symmetric_vq_loss, gram_loss] if out.selections else []
    return out.loss + out.quantized.square().sum() + sum(loss(out) for loss in losses)


@quantizers_where(lambda q: not has(q, TransformedCodebook))
def test_gradients_are_those_of_the_codebook_that_the_call_used(make):
    """Moving codes between the call and the backward pass does not change the gradients."""
    quantizer, moving = make(), make()
    moving.load_state_dict(quantizer.state_dict())
    gradients = []
    for each in (quantizer, moving):
        x = draw(each).requires_grad_()
        torch.manual_seed(1)
        loss = every_loss(each(x))
        for codebook in each.codebooks if each is moving else ():
            everywhere = torch.ones(codebook.num_codes, dtype=torch.bool)
            codebook.set_codes_(codebook.codes() + 100, everywhere)
        gradients.append(torch.autograd.grad(loss, x)[0])
    exactly(gradients[0], gradients[1])


ON_DISTANCES = {
    "cross-entropy": lambda q, out, x: index_cross_entropy(q.logits(x), out.indices),
    "entropy": lambda q, out, x: entropy_loss(q.logits(x, temperature=2.0)),
    "soft-targets": lambda q, out, x: distance_cross_entropy(
        q.logits(x), out.indices, q.codebook.codes()
    ),
}


def gradient_or_refusal(loss, x):
    try:
        return torch.autograd.grad(loss, x)[0]
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("loss", ON_DISTANCES.values(), ids=ON_DISTANCES.keys())
def test_losses_on_distances_are_never_silently_those_of_other_codes(loss, metric):
    """Autograd raises if a matrix product saved the codes and a rule moved them since."""
    found = []
    for step in (False, True):
        torch.manual_seed(3)
        quantizer = vq(metric=metric)
        rules = [rule(quantizer) for rule in RULES.values()]
        x = draw(quantizer).requires_grad_()
        out = quantizer(x)
        total = loss(quantizer, out, x)
        for rule in rules if step else ():
            rule.step(out)
        found.append(gradient_or_refusal(total, x))
    if isinstance(found[1], str):
        assert metric == "dot"
        assert "modified by an inplace operation" in found[1]
    else:
        exactly(found[1], found[0])
