"""`BSQ`: codes of unit length, and the gradient of the projection onto the sphere."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.quantizers.test_lfq import all_codes, entropies, exactly
from vqprior import BSQ, LFQ


@pytest.mark.parametrize("num_bits", [1, 2, 4, 7, 18, 62])
def test_codes_have_unit_length_and_the_bits_of_lfq(num_bits):
    x = torch.randn(100, num_bits)
    out = BSQ(num_bits)(x)
    exactly(out.indices, LFQ(num_bits).encode(x))
    assert_close(out.quantized, torch.where(x > 0, 1.0, -1.0) / num_bits**0.5)
    assert_close(out.quantized.norm(dim=1), torch.ones(100))
    exactly(BSQ(num_bits).decode(out.indices), out.quantized)


def test_zero_counts_as_negative():
    assert BSQ(3)(torch.tensor([[0.0, 5.0, -0.0], [0.0, 0.0, 0.0]])).indices.tolist() == [2, 0]


def test_the_gradient_is_the_jacobian_of_the_projection():
    """``(I - u u^T) / |x|``, written out."""
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64)
    (actual,) = torch.autograd.grad((weight * BSQ(4)(x).quantized).sum(), x)
    for row, wanted, got in zip(x.detach(), weight, actual, strict=True):
        u = row / row.norm()
        jacobian = (torch.eye(4, dtype=torch.float64) - torch.outer(u, u)) / row.norm()
        assert_close(got, jacobian @ wanted)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_entropies_are_those_of_a_softmax_over_all_codes(temperature):
    bsq = BSQ(5, sample_entropy_weight=1.0, batch_entropy_weight=0.5, temperature=temperature)
    x = 7 * torch.randn(30, 5)
    unit = F.normalize(x.double(), dim=1)
    of_token, of_batch = entropies(unit, all_codes(5, 5**-0.5), temperature)
    expected = of_token - 0.5 * of_batch
    assert_close(bsq(x).terms["entropy"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_entropy_of_a_token_is_that_of_the_paper():
    """Bits are independent with log-odds of ``4 u_i / sqrt(d)`` at temperature 1."""
    x = torch.randn(30, 6)
    p = (4 * F.normalize(x.double(), dim=1) / 6**0.5).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum(dim=1).mean()
    terms = BSQ(6, sample_entropy_weight=1.0, batch_entropy_weight=0.0)(x).terms
    assert_close(terms["entropy"].double(), entropy, rtol=1e-5, atol=1e-6)


def test_commitment_is_that_of_the_projected_vector():
    x = 9 * torch.randn(20, 4, requires_grad=True)
    terms = BSQ(4, commitment_weight=0.25)(x).terms
    unit = F.normalize(x, dim=1)
    expected = 0.25 * (unit - torch.where(x > 0, 0.5, -0.5)).square().mean()
    assert_close(terms["commitment"], expected)
    assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (terms["commitment"], expected)))
    assert sorted(BSQ(4)(x).terms) == ["entropy"]


def test_the_distance_to_the_code_is_bounded():
    """``|u - code|^2 = 2 - 2 <u, code>``, at most that of a vector along one axis."""
    x = torch.cat([torch.eye(8), torch.randn(100, 8)])
    out = BSQ(8)(x)
    distances = (F.normalize(x, dim=1) - out.quantized).square().sum(dim=1)
    assert distances.max() <= 2 - 2 / 8**0.5 + 1e-6  # a rounding


def test_a_zero_vector_is_finite():
    x = torch.zeros(3, 4, requires_grad=True)
    out = BSQ(4, commitment_weight=0.25)(x)
    exactly(out.quantized.detach(), torch.full((3, 4), -0.5))
    (out.loss + out.quantized.sum()).backward()
    assert out.loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("end", ["tiny", "max"])
def test_the_ends_of_the_range_are_projected_too(dtype, end):
    """Their squares are zero or infinite."""
    limits = torch.finfo(dtype)
    scale = limits.max / 4 if end == "max" else 16 * limits.tiny
    x = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    extreme = (scale * x.double()).to(dtype).requires_grad_()
    bsq = BSQ(4, commitment_weight=0.25)
    out, expected = bsq(extreme), bsq(x)
    exactly(out.indices, expected.indices)
    assert_close(out.terms, expected.terms, rtol=1e-4, atol=1e-4)  # a few bits are lost at the end
    out.loss.backward()
    assert extreme.grad.isfinite().all()


def test_length_does_not_matter():
    x = torch.randn(50, 4)
    bsq = BSQ(4, commitment_weight=0.25)
    exactly(bsq(x).terms, bsq(2.0**40 * x).terms)  # a power of two rounds nothing


def test_repr_and_wrong_arguments():
    assert repr(BSQ(4)).startswith("BSQ(4, commitment_weight=0.0, sample_entropy_weight=0.1")
    message = (
        "`num_bits` must be at most 62, got 63. For more bits, combine several in a "
        "`GroupedQuantizer`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BSQ(63)
    with pytest.raises(TypeError, match=r"explicit codebook for `logits`, got BSQ\."):
        BSQ(4).logits(torch.zeros(1, 4))
