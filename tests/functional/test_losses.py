"""Losses against their formulas and against torch."""

import dataclasses
import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import Selection, VectorQuantizer
from vqprior.functional import (
    code_cross_entropy,
    codebook_loss,
    commitment_loss,
    masked_mean_square,
)

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


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
def test_codebooks_add_up(loss):
    out = VectorQuantizer(3, 8)(torch.randn(4, 3))
    chosen = selection()
    both = dataclasses.replace(out, selections=(*out.selections, chosen))
    assert_close(loss(both), loss(out) + loss(chosen))
    assert_close(loss(dataclasses.replace(out, selections=())), torch.zeros(()))


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
def test_low_precision_is_averaged_in_float32(loss):
    """In float16 the square of 300 overflows."""
    ones = torch.ones(1000, 2, dtype=torch.float16)
    mask = torch.ones(1000, dtype=torch.bool)
    chosen = Selection(inputs=300 * ones, codes=0 * ones, indices=mask.long(), mask=mask)
    assert_close(loss(chosen), torch.tensor(90000.0), rtol=0, atol=0)


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
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


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
def test_cross_entropy_is_that_of_torch(leading, label_smoothing):
    logits, indices = torch.randn(*leading, 5), torch.randint(0, 5, leading)
    expected = F.cross_entropy(
        logits.reshape(-1, 5), indices.reshape(-1), label_smoothing=label_smoothing
    )
    assert_close(code_cross_entropy(logits, indices, label_smoothing=label_smoothing), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_cross_entropy_leaves_minus_one_out(label_smoothing, value):
    logits, indices = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, -1, 1])
    counted = indices >= 0
    expected = code_cross_entropy(
        logits[counted], indices[counted], label_smoothing=label_smoothing
    )
    logits[~counted] = value
    logits.requires_grad_()
    loss = code_cross_entropy(logits, indices, label_smoothing=label_smoothing)
    assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[~counted].any()
    assert logits.grad[counted].isfinite().all()


@pytest.mark.parametrize("n", [0, 3])
def test_cross_entropy_without_a_token_is_0(n):
    logits = torch.randn(n, 5, requires_grad=True)
    loss = code_cross_entropy(logits, torch.full((n,), -1))
    assert_close(loss, torch.zeros(()))
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32], ids=str)
def test_cross_entropy_takes_any_integer_dtype(dtype):
    logits, indices = torch.randn(6, 5), torch.tensor([0, -1, 4, 2, -1, 1])
    expected = code_cross_entropy(logits, indices)
    assert_close(code_cross_entropy(logits, indices.to(dtype)), expected, rtol=0, atol=0)


def test_cross_entropy_of_low_precision_is_float32():
    logits = torch.randn(6, 5).bfloat16()
    indices = torch.arange(6) % 5
    loss = code_cross_entropy(logits, indices)
    assert_close(loss, F.cross_entropy(logits.float(), indices))


@pytest.mark.parametrize(
    ("logits", "indices", "options", "error", "message"),
    [
        (
            torch.zeros(2, 3).long(),
            torch.zeros(2).long(),
            {},
            TypeError,
            "`logits` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2),
            {},
            TypeError,
            "`indices` must be an integer tensor, got torch.float32.",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(3).long(),
            {},
            ValueError,
            "`indices` must have shape (2,), got (3,).",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2).long(),
            {"label_smoothing": 1.0},
            ValueError,
            "`label_smoothing` must be in [0.0, 1.0), got 1.0.",
        ),
    ],
)
def test_cross_entropy_rejects_wrong_arguments(logits, indices, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        code_cross_entropy(logits, indices, **options)
