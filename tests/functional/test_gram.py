"""Losses on Gram matrices, against sums over samples, tokens and pairs written out."""

import dataclasses
import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, NoHostSync
from vqprior import Selection, VectorQuantizer
from vqprior.functional import gram_loss, orthogonality_loss


def selection(leading, mask=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    inputs, codes = (torch.randn(*leading, 3, generator=generator).to(dtype) for _ in range(2))
    mask = torch.ones(leading, dtype=torch.bool) if mask is None else mask
    inputs.requires_grad_()
    codes.requires_grad_()
    return Selection(inputs=inputs, codes=codes, indices=mask.long() - 1, mask=mask)


def by_definition(samples):
    """The mean over samples ``(tokens, codes)`` of the mean square between their matrices."""
    losses = []
    for z, e in samples:
        outer = [sum(torch.outer(row, row) for row in t) / len(t) for t in (z, e.detach())]
        losses.append((outer[0] - outer[1]).square().mean())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("leading", [(2, 7), (3, 4, 5), (2, 2, 2, 2)])
def test_gram_compares_the_matrices_of_each_sample(leading):
    chosen = selection(leading)
    loss = gram_loss(chosen)
    flat = [t.flatten(1, -2) for t in (chosen.inputs, chosen.codes)]
    expected = by_definition(list(zip(*flat, strict=True)))
    assert_close(loss, expected)
    actual = torch.autograd.grad(loss, [chosen.inputs, chosen.codes], allow_unused=True)
    assert_close(actual[0], torch.autograd.grad(expected, chosen.inputs)[0])
    assert actual[1] is None


def test_gram_of_a_list_of_tokens_is_that_of_one_sample():
    chosen = selection((7,))
    assert_close(gram_loss(chosen), by_definition([(chosen.inputs, chosen.codes)]))
    one = selection(())
    assert_close(gram_loss(one), by_definition([(one.inputs[None], one.codes[None])]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 5.0])
def test_gram_counts_the_tokens_of_each_sample(value):
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    chosen = selection((3, 3), mask)
    expected = by_definition(
        [(chosen.inputs[b, mask[b]], chosen.codes[b, mask[b]]) for b in (0, 2)]
    ).detach()
    with torch.no_grad():
        chosen.inputs[~mask] = value
    loss = gram_loss(chosen)
    assert_close(loss, expected)
    loss.backward()
    assert not chosen.inputs.grad[~mask].any()
    assert chosen.inputs.grad.isfinite().all()


@pytest.mark.parametrize("leading", [(0,), (4,), (2, 3), (0, 3), (2, 0)])
def test_gram_without_a_token_is_0(leading):
    chosen = selection(leading, torch.zeros(leading) > 0)
    loss = gram_loss(chosen)
    assert_close(loss, torch.zeros((), dtype=torch.float64))
    loss.backward()
    assert not chosen.inputs.grad.any()


def test_gram_of_several_codebooks_adds_up():
    out = VectorQuantizer(3, 8)(torch.randn(2, 4, 3))
    chosen = selection((2, 5), dtype=torch.float32)
    both = dataclasses.replace(out, selections=(*out.selections, chosen))
    assert_close(gram_loss(both), gram_loss(out) + gram_loss(chosen))


def test_gram_of_low_precision_is_computed_in_float32():
    """In float16 the square of 300 overflows, and autocast would round to bfloat16."""
    chosen = selection((2, 7), dtype=torch.float32)
    chosen = dataclasses.replace(
        chosen, inputs=(300 * chosen.inputs).half(), codes=(300 * chosen.codes).half()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gram_loss(chosen)
    wide = [t.double() for t in (chosen.inputs, chosen.codes)]
    expected = by_definition(list(zip(*wide, strict=True)))
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_gram_compiles_in_one_graph_without_waiting():
    torch.compiler.reset()
    chosen = selection((2, 7), dtype=torch.float32)
    compiled = torch.compile(gram_loss, fullgraph=True, backend="aot_eager")
    with NoHostSync():
        expected = gram_loss(chosen)
    assert_close(compiled(chosen), expected)


def cosines_by_definition(codes):
    unit = codes / codes.norm(dim=1, keepdim=True)
    return (unit @ unit.T).square().sum() / len(codes) ** 2 - 1 / len(codes)


@pytest.mark.parametrize(("k", "d"), [(7, 3), (3, 7), (4, 4), (1, 2)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthogonality_is_the_mean_squared_cosine_of_other_pairs(k, d, scale):
    codes = torch.randn(k, d, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(cosines_by_definition(codes), codes)
    scaled = (scale * codes).detach().float().requires_grad_()
    loss = orthogonality_loss(scaled)
    assert_close(loss.double(), cosines_by_definition(codes), rtol=1e-5, atol=1e-6)
    (actual,) = torch.autograd.grad(loss, scaled)
    assert_close(actual.double() * scale, expected, rtol=1e-4, atol=1e-6)


def test_orthogonality_is_differentiated_exactly():
    codes = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthogonality_loss, codes)


def test_orthogonality_teaches_directions():
    codes = torch.randn(4, 4, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality_loss(codes).backward()
        optimizer.step()
    directions = F.normalize(codes.detach(), dim=1)
    assert_close(directions @ directions.T, torch.eye(4), rtol=0, atol=0.01)


def test_a_zero_code_has_no_gradient():
    codes = torch.randn(4, 3)
    codes[1] = 0
    codes.requires_grad_()
    orthogonality_loss(codes).backward()
    assert codes.grad.isfinite().all()
    assert not codes.grad[1].any()


def test_orthogonality_stores_no_pairs_and_compiles():
    torch.compiler.reset()
    codes = torch.randn(300, 4, requires_grad=True)
    with LargestTensor() as largest, NoHostSync():
        loss = orthogonality_loss(codes)
        loss.backward()
    assert largest.numel <= 300 * 4
    compiled = torch.compile(orthogonality_loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(codes), loss)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_orthogonality_of_low_precision_is_computed_in_float32(low):
    codes = (100 * torch.randn(50, 8)).to(low).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = orthogonality_loss(codes)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), cosines_by_definition(codes.double()), rtol=1e-5, atol=1e-6)


def test_orthogonality_refuses_codes_that_cannot_learn():
    message = (
        "`codes` must require gradients, got a tensor that does not. A codebook that a rule "
        "updates does not learn from losses: drop this term, or measure it under "
        "`torch.no_grad()`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        orthogonality_loss(torch.randn(4, 3))
    with torch.no_grad():
        assert_close(orthogonality_loss(torch.eye(3)), torch.zeros(()))


def test_orthogonality_rejects_what_is_no_codebook():
    with pytest.raises(ValueError, match=r"^`codes` must have shape \(k, d\) with k and d at l"):
        orthogonality_loss(torch.randn(3, requires_grad=True))
    with pytest.raises(TypeError, match=r"^`codes` must be a floating-point tensor, got torch.int"):
        orthogonality_loss(torch.ones(3, 2).long())
