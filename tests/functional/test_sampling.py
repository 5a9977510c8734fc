"""Drawn indices: frequencies within four standard errors, exclusions exactly."""

import re

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, NoHostSync
from vqprior.functional import sample_indices

N = 40_000
LOGITS = torch.tensor([1.0, -1.0, 0.5, 2.0, -3.0, 0.5])


def frequencies(logits, **options):
    generator = torch.Generator().manual_seed(8)
    drawn = sample_indices(logits.expand(N, -1), generator=generator, **options)
    assert drawn.dtype == torch.int64
    return torch.bincount(drawn, minlength=logits.shape[-1]) / N


def assert_follows(actual, p):
    assert not actual[p == 0].any()
    assert ((actual - p).abs() <= 4 * (p * (1 - p) / N).sqrt()).all()


def kept(logits, places):
    """The softmax over the codes in ``places`` alone."""
    mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
    mask[places] = True
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    p = (LOGITS / temperature).softmax(-1)
    assert_follows(frequencies(LOGITS, temperature=temperature), p)
    sorted_path = frequencies(LOGITS, temperature=temperature, top_k=6)
    assert_follows(sorted_path, p)


@pytest.mark.parametrize(
    ("top_k", "places"), [(1, [3]), (2, [3, 0]), (3, [3, 0, 2]), (4, [3, 0, 2, 5]), (9, range(6))]
)
def test_top_k_keeps_the_most_likely_and_lower_indices_among_equals(top_k, places):
    assert_follows(frequencies(LOGITS, top_k=top_k), kept(LOGITS, list(places)))


@pytest.mark.parametrize(
    ("top_p", "places"),
    [  # sums of the most likely ones: 0.5346, 0.7313, 0.8506, 0.9699, 0.9964, 1
        (1e-9, [3]),
        (0.53, [3]),
        (0.54, [3, 0]),
        (0.73, [3, 0]),
        (0.74, [3, 0, 2]),
        (0.86, [3, 0, 2, 5]),
        (0.98, [3, 0, 2, 5, 1]),
        (1.0, range(6)),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, places):
    assert_follows(frequencies(LOGITS, top_p=top_p), kept(LOGITS, list(places)))


def test_top_p_of_exact_probabilities_stops_at_equality():
    uniform = torch.zeros(4)  # probabilities of exactly a quarter
    assert_follows(frequencies(uniform, top_p=0.5), torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert_follows(frequencies(uniform, top_p=0.51), kept(uniform, [0, 1, 2]))


def test_top_k_acts_first():
    # Of the two that `top_k` leaves, the first has 0.731; of all codes, 0.535.
    assert_follows(frequencies(LOGITS, top_k=2, top_p=0.7), kept(LOGITS, [3]))
    assert_follows(frequencies(LOGITS, top_p=0.7), kept(LOGITS, [3, 0]))
    assert_follows(frequencies(LOGITS, top_k=3, top_p=0.8), kept(LOGITS, [3, 0]))


def test_temperature_acts_before_top_p():
    # At temperature 4 the most likely code has 0.256.
    assert_follows(frequencies(LOGITS, temperature=4.0, top_p=0.3), kept(LOGITS / 4, [3, 0]))


def test_forbidden_codes_are_never_drawn():
    forbidding = LOGITS.index_fill(0, torch.tensor([0, 3]), -torch.inf)
    for options in ({}, {"top_k": 5}, {"top_p": 0.999999}, {"temperature": 100.0}):
        assert not frequencies(forbidding, **options)[[0, 3]].any()


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.1}], ids=str)
def test_temperature_0_takes_the_first_of_the_most_likely_and_draws_nothing(options):
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 5.0]])
    rng = torch.get_rng_state()
    drawn = sample_indices(logits, temperature=0.0, **options)
    assert_close(drawn, torch.tensor([1, 0, 2]), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_low_temperatures_approach_the_most_likely(temperature, scale):
    drawn = sample_indices(scale * LOGITS.expand(100, -1), temperature=temperature)
    assert (drawn == 3).all()
    assert (sample_indices(LOGITS.expand(100, -1), temperature=temperature, top_p=0.9) == 3).all()


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(low):
    logits = torch.tensor([0.0, 1.0, 2.0]).to(low)  # exact in each
    assert_follows(frequencies(logits), logits.float().softmax(-1))


def test_a_generator_decides_alone():
    rng = torch.get_rng_state()
    drawn = [
        sample_indices(LOGITS.expand(200, -1), generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(torch.get_rng_state(), rng)
    assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("leading", [(), (7,), (2, 0, 3), (2, 3)])
def test_leading_dimensions_are_free(options, leading):
    drawn = sample_indices(torch.randn(*leading, 5), **options)
    assert drawn.shape == leading
    assert ((drawn >= 0) & (drawn < 5)).all()


def test_no_gradient_no_waiting_and_nothing_larger_than_logits():
    logits = torch.randn(30, 20, requires_grad=True)
    with LargestTensor() as largest, NoHostSync():
        drawn = sample_indices(logits, top_k=10, top_p=0.9)
    assert not drawn.requires_grad
    assert largest.numel <= 30 * 20


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_compiles_in_one_graph(options):
    torch.compiler.reset()
    logits = torch.randn(30, 5)
    results = []
    for call in (
        sample_indices,
        torch.compile(sample_indices, fullgraph=True, backend="aot_eager"),
    ):
        torch.manual_seed(0)
        results.append(call(logits, **options))
    assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        (
            torch.zeros(2, 3).long(),
            {},
            TypeError,
            "`logits` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(2, 0),
            {},
            ValueError,
            "`logits` must have shape (..., k) with k at least 1, got (2, 0).",
        ),
        (
            torch.zeros(()),
            {},
            ValueError,
            "`logits` must have shape (..., k) with k at least 1, got ().",
        ),
        (
            torch.zeros(3),
            {"temperature": -1.0},
            ValueError,
            "`temperature` must be at least 0.0, got -1.0.",
        ),
        (torch.zeros(3), {"top_k": 0}, ValueError, "`top_k` must be at least 1, got 0."),
        (torch.zeros(3), {"top_p": 0.0}, ValueError, "`top_p` must be in (0, 1], got 0.0."),
        (torch.zeros(3), {"top_p": 1.5}, ValueError, "`top_p` must be in (0, 1], got 1.5."),
    ],
)
def test_wrong_arguments(logits, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        sample_indices(logits, **options)
