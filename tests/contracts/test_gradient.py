"""Law 3: the estimator's gradient, the identity by default, and live losses."""

import torch
from torch.testing import assert_close

from tests.contracts.factories import (
    arrange,
    before_quantization,
    draw,
    estimates_straight_through,
    estimates_through_indices,
    every_quantizer,
    has,
    quantizers_where,
)
from vqprior import FSQ, EmbeddingCodebook, ProjectedQuantizer, TransformedCodebook


def has_term(name, *, of_one_table=False):
    """Those with a term; and no more than one codebook, a table, in the space of the input."""

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
    alive = (gradient != 0).any(dim=0)
    assert alive.all() or (has(quantizer, FSQ) and alive.sum() >= quantizer.dim - 1)


@has_term("commitment", of_one_table=True)
def test_commitment_pulls_toward_the_code_that_was_chosen(make):
    quantizer = make()
    x = draw(quantizer, (6,)).requires_grad_()
    out = quantizer(x)
    (selection,) = out.selections
    difference = (selection.inputs - selection.codes).detach()
    (gain,) = torch.autograd.grad(before_quantization(quantizer, x).sum(), x)
    # 0.25 times the derivative of a mean of squares, through whatever precedes the codebook.
    expected = 0.25 * 2 * arrange(quantizer, difference) / difference.numel() * gain
    assert_close(torch.autograd.grad(out.loss, x)[0], expected)


@has_term("codebook", of_one_table=True)
def test_codebook_gradient_reaches_chosen_rows_only(make):
    quantizer = make()
    out = quantizer(draw(quantizer, (5,)))
    out.loss.backward()
    (codebook,), (selection,) = quantizer.codebooks, out.selections
    chosen = torch.zeros(codebook.num_codes, dtype=torch.bool)
    chosen[selection.indices] = True
    (gradient,) = [p.grad for p in codebook.parameters()]
    assert_close((gradient != 0).any(dim=1), chosen)


@every_quantizer
def test_a_term_exists_only_if_it_can_act(make):
    quantizer = make().requires_grad_(requires_grad=False)
    assert "codebook" not in quantizer(draw(quantizer)).terms


@quantizers_where(lambda q: not has(q, TransformedCodebook))
def test_gradients_are_those_of_the_codebook_that_the_call_used(make):
    """Codes that move between the call and the backward pass do not change the gradients."""
    quantizer, moving = make(), make()
    moving.load_state_dict(quantizer.state_dict())
    gradients = []
    for each in (quantizer, moving):
        x = draw(each).requires_grad_()
        torch.manual_seed(1)
        out = each(x)
        for codebook in each.codebooks if each is moving else ():
            everywhere = torch.ones(codebook.num_codes, dtype=torch.bool)
            codebook.set_codes_(codebook.codes() + 100, everywhere)
        loss = out.loss + out.quantized.square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)
