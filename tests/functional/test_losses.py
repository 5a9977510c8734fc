"""Losses against their formulas and against torch."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.observers import NoHostSync
from vqprior import Selection, VectorQuantizer
from vqprior.functional import (
    codebook_loss,
    commitment_loss,
    masked_mean_square,
    symmetric_vq_loss,
)

LOSSES = [commitment_loss, codebook_loss, symmetric_vq_loss]
MASK = torch.tensor([True, True, False, True])


def selection(dtype=torch.float32):
    torch.manual_seed(3)
    inputs = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    codes = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    return Selection(inputs=inputs, codes=codes, indices=torch.tensor([0, 1, -1, 2]), mask=MASK)


def test_commitment_is_the_mean_square_that_moves_the_inputs_alone():
    chosen = selection()
    loss = commitment_loss(chosen)
    expected = (chosen.inputs - chosen.codes)[MASK].square().sum() / 9
    assert_close(loss, expected)
    loss.backward()
    assert_close(chosen.inputs.grad[MASK], 2 * (chosen.inputs - chosen.codes)[MASK].detach() / 9)
    assert not chosen.inputs.grad[~MASK].any()
    assert chosen.codes.grad is None


def test_codebook_loss_has_the_same_value_and_moves_the_codes_alone():
    chosen = selection()
    loss = codebook_loss(chosen)
    assert_close(loss, commitment_loss(chosen))
    loss.backward()
    assert_close(chosen.codes.grad[MASK], 2 * (chosen.codes - chosen.inputs)[MASK].detach() / 9)
    assert chosen.inputs.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_codebooks_add_up(loss):
    out = VectorQuantizer(3, 8)(torch.randn(4, 3))
    chosen = selection()
    both = dataclasses.replace(out, selections=(*out.selections, chosen))
    assert_close(loss(both), loss(out) + loss(chosen))
    assert_close(loss(dataclasses.replace(out, selections=())), torch.zeros(()))


@pytest.mark.parametrize("loss", LOSSES)
def test_low_precision_is_averaged_in_float32(loss):
    """In float16 the square of 300 overflows."""
    ones = torch.ones(1000, 2, dtype=torch.float16)
    mask = torch.ones(1000, dtype=torch.bool)
    chosen = Selection(inputs=300 * ones, codes=0 * ones, indices=mask.long(), mask=mask)
    assert_close(loss(chosen), torch.tensor(90000.0), rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_double_precision_is_kept(loss):
    assert loss(selection(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_masked_mean_square_ignores_what_masked_tokens_hold(value):
    x = torch.randn(4, 3)
    x[~MASK] = value
    x.requires_grad_()
    loss = masked_mean_square(x, MASK)
    assert_close(loss, x.detach()[MASK].square().mean())
    loss.backward()
    assert x.grad.isfinite().all()
    assert_close(masked_mean_square(x, torch.zeros(4) > 0), torch.zeros(()))


def test_masked_mean_square_rejects_wrong_masks():
    with pytest.raises(TypeError, match=r"^`mask` must be a boolean tensor, .*got torch\.int64"):
        masked_mean_square(torch.ones(4, 3), MASK.long())
    with pytest.raises(ValueError, match=r"^`mask` must have shape \(4,\), got \(4, 3\)\.$"):
        masked_mean_square(torch.ones(4, 3), torch.ones(4, 3) > 0)


def test_joint_loss_moves_both_sides():
    chosen = selection(torch.float64)
    loss = symmetric_vq_loss(chosen)
    assert_close(loss, (chosen.inputs - chosen.codes)[MASK].square().mean())
    loss.backward()
    expected = 2 * (chosen.inputs - chosen.codes).detach() / 9 * MASK.unsqueeze(1)
    assert_close(chosen.inputs.grad, expected)
    assert_close(chosen.codes.grad, -expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [0, 4])
def test_without_a_token_losses_are_0(loss, n):
    inputs = torch.full((n, 3), torch.nan, requires_grad=True)
    codes = torch.zeros(n, 3, requires_grad=True)
    mask = torch.zeros(n) > 0
    value = loss(Selection(inputs=inputs, codes=codes, indices=mask.long() - 1, mask=mask))
    assert_close(value, torch.zeros(()))
    value.backward()
    assert not any(t.grad.any() for t in (inputs, codes) if t.grad is not None)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_compile_in_one_graph(loss):
    torch.compiler.reset()
    chosen = selection()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with NoHostSync():
        expected = loss(chosen)
    assert_close(compiled(chosen), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_have_the_derivatives_of_the_formula_twice_over(loss):
    chosen = selection(dtype=torch.float64)

    def of(inputs, codes):
        return loss(dataclasses.replace(chosen, inputs=inputs, codes=codes))

    inputs, codes = (t.detach().requires_grad_() for t in (chosen.inputs, chosen.codes))
    fixed = {commitment_loss: (inputs, codes.detach()), codebook_loss: (inputs.detach(), codes)}
    arguments = fixed.get(loss, (inputs, codes))
    assert torch.autograd.gradcheck(of, arguments)
    assert torch.autograd.gradgradcheck(of, arguments)
    expected = torch.autograd.grad(of(inputs, codes), (inputs, codes), materialize_grads=True)
    batch = (torch.stack([t.detach()] * 2) for t in (inputs, codes))
    for found, one in zip(
        torch.func.vmap(torch.func.grad(of, (0, 1)))(*batch), expected, strict=True
    ):
        assert_close(found, torch.stack([one] * 2))
