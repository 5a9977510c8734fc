"""`LFQ`: signs, bits, and entropies against a list of all codes."""

import itertools
import re

import pytest
import torch
from torch.testing import assert_close

from vqprior import LFQ


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def all_codes(num_bits, scale=1.0):
    """Every code in the order of its index: the first bit varies fastest."""
    rows = [row[::-1] for row in itertools.product([-1.0, 1.0], repeat=num_bits)]
    return scale * torch.tensor(rows, dtype=torch.float64)


def entropies(x, codes, temperature):
    """Mean entropy of a token and entropy of the mean, of a softmax over all codes."""
    distances = (x.double().unsqueeze(-2) - codes).square().sum(dim=-1)
    log_p = (-distances / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    mean = p.mean(dim=0)
    return -(p * log_p).sum(dim=-1).mean(), -(mean * mean.log()).sum()


def test_values_are_signs_and_zero_counts_as_negative():
    x = torch.tensor([[0.5, -2.0, 1e-30], [0.0, -0.0, 3.0], [-1e-30, 7.0, -9.0]])
    out = LFQ(3)(x)
    exactly(out.quantized, torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]))
    assert out.indices.tolist() == [0b101, 0b100, 0b010]  # the first feature is the lowest bit


def test_codes_are_in_the_order_of_their_bits():
    lfq = LFQ(4)
    assert_close(lfq.decode(torch.arange(16)).double(), all_codes(4))
    exactly(lfq.encode(all_codes(4).float()), torch.arange(16))
    exactly(lfq.decode(torch.tensor(-1)), torch.zeros(4))


@pytest.mark.parametrize("num_bits", [1, 31, 32, 33, 53, 54, 62])
def test_every_bit_survives_a_round_trip(num_bits):
    lfq = LFQ(num_bits)
    bits = torch.randint(2, (200, num_bits))
    bits[0], bits[1] = 0, 1
    expected = [sum(bit << i for i, bit in enumerate(row)) for row in bits.tolist()]
    x = 2.0 * bits - 1
    assert lfq.encode(x).tolist() == expected
    exactly(lfq.decode(lfq.encode(x)), x)
    assert max(expected) == 2**num_bits - 1
    assert (lfq.codebook_size, lfq.bits_per_token) == (2**num_bits, num_bits)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("weights", [(0.1, 0.1), (1.0, 0.0), (0.0, 2.0)])
def test_the_entropies_are_those_of_a_softmax_over_all_codes(temperature, weights):
    lfq = LFQ(
        5,
        sample_entropy_weight=weights[0],
        batch_entropy_weight=weights[1],
        temperature=temperature,
    )
    x = 0.4 * torch.randn(30, 5)
    of_token, of_batch = entropies(x, all_codes(5), temperature)
    expected = weights[0] * of_token - weights[1] * of_batch
    assert_close(lfq(x).terms["entropy"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_entropies_is_that_of_the_list():
    lfq = LFQ(4, commitment_weight=0.0, temperature=1.0).double()
    x = 0.4 * torch.randn(20, 4, dtype=torch.float64)
    x.requires_grad_()
    of_token, of_batch = entropies(x, all_codes(4), 1.0)
    (expected,) = torch.autograd.grad(0.1 * of_token - 0.1 * of_batch, x)
    # The loss is a float32 scalar, so its gradient is too.
    assert_close(torch.autograd.grad(lfq(x).loss, x)[0], expected, rtol=1e-5, atol=1e-8)


def test_groups_of_bits_sum_their_batch_entropies():
    x, options = 0.3 * torch.randn(40, 5), {"temperature": 1.0, "sample_entropy_weight": 0.0}
    terms = LFQ(5, group_size=2, **options)(x).terms
    parts = [entropies(part, all_codes(part.shape[1]), 1.0)[1] for part in x.split(2, dim=1)]
    assert_close(terms["entropy"].double(), -0.1 * sum(parts), rtol=1e-5, atol=1e-6)
    assert terms["entropy"] < LFQ(5, **options)(x).terms["entropy"]  # an upper bound of the entropy


def test_commitment_is_the_mean_square_to_the_signs():
    x = torch.randn(20, 4, requires_grad=True)
    terms = LFQ(4, commitment_weight=2.0)(x).terms
    signs = torch.where(x > 0, 1.0, -1.0)
    assert_close(terms["commitment"], 2.0 * (x - signs).square().mean())
    (gradient,) = torch.autograd.grad(terms["commitment"], x)
    assert_close(gradient, (2.0 * 2 * (x - signs) / 80).detach())


def test_the_gradient_of_quantized_is_the_identity():
    x, weight = torch.randn(20, 4, requires_grad=True), torch.randn(20, 4)
    exactly(torch.autograd.grad((weight * LFQ(4)(x).quantized).sum(), x)[0], weight)


def test_sixty_two_bits_train():
    x = torch.randn(50, 62, requires_grad=True)
    out = LFQ(62, temperature=1.0)(x)
    out.loss.backward()
    assert out.loss.isfinite()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_tiny_and_huge_inputs_have_finite_gradients(scale):
    x = (scale * torch.randn(50, 6)).requires_grad_()
    out = LFQ(6)(x)
    exactly(out.quantized.detach(), torch.where(x > 0, 1.0, -1.0))
    out.loss.backward()
    assert out.loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["commitment", "entropy"]),
        ({"commitment_weight": 0.0}, ["entropy"]),
        ({"sample_entropy_weight": 0.0}, ["commitment", "entropy"]),
        ({"sample_entropy_weight": 0.0, "batch_entropy_weight": 0.0}, ["commitment"]),
    ],
)
def test_a_weight_of_0_removes_its_term(options, names):
    assert sorted(LFQ(4, **options)(torch.randn(9, 4)).terms) == names


def test_assign_has_the_losses_of_the_codes_given():
    lfq, x = LFQ(3), torch.randn(3, 3)
    out = lfq.quantize_as(x, torch.tensor([5, -1, 0]))
    exactly(out.quantized, torch.tensor([[1.0, -1, 1], [0, 0, 0], [-1, -1, -1]]))
    errors = (x - out.quantized)[[0, 2]].square().mean()
    assert_close(out.terms["commitment"], 0.25 * errors)


def test_repr_shows_options():
    assert repr(LFQ(4)) == (
        "LFQ(4, commitment_weight=0.25, sample_entropy_weight=0.1, batch_entropy_weight=0.1, "
        "temperature=0.01, group_size=9)"
    )


@pytest.mark.parametrize(
    ("num_bits", "options", "message"),
    [
        (0, {}, "`num_bits` must be at least 1, got 0."),
        (
            63,
            {},
            "`num_bits` must be at most 62, got 63. For more bits, combine several in a "
            "`GroupedQuantizer`.",
        ),
        (4, {"commitment_weight": -1.0}, "`commitment_weight` must be at least 0.0, got -1.0."),
        (
            4,
            {"sample_entropy_weight": -1.0},
            "`sample_entropy_weight` must be at least 0.0, got -1.0.",
        ),
        (
            4,
            {"batch_entropy_weight": -1.0},
            "`batch_entropy_weight` must be at least 0.0, got -1.0.",
        ),
        (4, {"temperature": 0.0}, "`temperature` must be greater than 0, got 0.0."),
        (4, {"group_size": 0}, "`group_size` must be at least 1, got 0."),
        (
            40,
            {"group_size": 21},
            "`group_size` must be at most 20, got 21. Use smaller groups: a group of `g` bits has "
            "`2**g` codes.",
        ),
    ],
)
def test_wrong_arguments(num_bits, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LFQ(num_bits, **options)


def test_there_is_no_codebook_to_rank():
    x = torch.zeros(1, 3)
    for call in (lambda: LFQ(3).logits(x), lambda: LFQ(3).nearest_indices(x, 1)):
        with pytest.raises(
            TypeError, match=r"must have one explicit codebook for `\w+`, got LFQ\."
        ):
            call()
