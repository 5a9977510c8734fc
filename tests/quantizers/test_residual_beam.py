"""`ResidualQuantizer`: the search over several partial sums."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.quantizers.stages import exactly, made_of, plain
from vqprior import (
    ResidualQuantizer,
)


def brute_force(residual, x):
    """The best sum of one code from each stage, over all combinations, in float64."""
    tables = [stage.codebook.codes().detach().double() for stage in residual.stages]
    choices = list(itertools.product(*[range(len(table)) for table in tables]))
    sums = torch.stack(
        [sum(table[i] for table, i in zip(tables, choice, strict=True)) for choice in choices]
    )
    errors = torch.cdist(x.double(), sums)
    return torch.tensor(choices)[errors.argmin(dim=1)], errors.amin(dim=1)


@pytest.mark.parametrize(("k", "q"), [(3, 3), (4, 2), (2, 4), (5, 3)])
def test_a_wide_beam_is_an_exhaustive_search(k, q):
    residual = plain(q, k=k, d=2, beam_size=k ** (q - 1))
    x = torch.randn(200, 2)
    choices, errors = brute_force(residual, x)
    out = residual(x)
    found = (x - out.quantized).norm(dim=1).double()
    assert_close(found, errors, rtol=1e-4, atol=1e-5)  # a square root of float32 rounding
    assert (out.indices == choices).all(dim=1).float().mean() > 0.98
    exactly(residual.encode(x), out.indices)


def test_a_wider_beam_errs_less_on_average():
    greedy = plain(4, k=8)
    x = torch.randn(2000, 4)
    errors = []
    for beam_size in (1, 2, 4, 16):
        searching = ResidualQuantizer(list(greedy.stages), beam_size=beam_size)
        errors.append((x - searching(x).quantized).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_a_beam_of_a_hand_made_case():
    """The greedy first choice, 0, leaves 4 for a code of 3; 5 and -1 hit exactly."""
    stages = [made_of([[0.0], [9.0], [5.0]]), made_of([[3.0], [-1.0]])]
    x = torch.tensor([[4.0], [2.4]])
    assert ResidualQuantizer(stages).encode(x).tolist() == [[2, 1], [0, 0]]
    assert ResidualQuantizer(stages, beam_size=2).encode(x).tolist() == [[2, 1], [0, 0]]
    stages = [made_of([[0.0], [3.0]]), made_of([[0.5], [-1.9]])]
    x = torch.tensor([[1.2]])  # 0 is nearer, but leaves 1.2 - 0.5; 3 leaves 0.1
    assert ResidualQuantizer(stages).encode(x).tolist() == [[0, 0]]
    assert ResidualQuantizer(stages, beam_size=2).encode(x).tolist() == [[1, 1]]


def test_ties_of_the_beam_go_to_the_lowest_indices():
    stages = [made_of([[0.0], [1.0], [0.0]]), made_of([[1.0], [0.0], [1.0]])]
    # A sum of 1 in six ways: (0, 0), (0, 2), (1, 1), (2, 0), (2, 2); of 0 in two.
    for beam_size in (2, 3, 9):
        residual = ResidualQuantizer(stages, beam_size=beam_size)
        assert residual.encode(torch.tensor([[0.0]])).tolist() == [[0, 1]]
    assert ResidualQuantizer(stages, beam_size=9).encode(torch.tensor([[1.0]])).tolist() == [[1, 1]]
    doubled = [made_of([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]]) for _ in range(3)]
    indices = ResidualQuantizer(doubled, beam_size=4).encode(torch.randn(100, 2) + 1)
    assert not (indices == 1).any()


@pytest.mark.parametrize("beam_size", [2, 50])
def test_a_beam_wider_than_a_codebook_of_few_codes(beam_size):
    residual = ResidualQuantizer([made_of([[0.0]]), made_of([[1.0], [-1.0]])], beam_size=beam_size)
    assert residual(torch.tensor([[0.7], [-0.2]])).indices.tolist() == [[0, 0], [0, 1]]


def test_a_beam_of_one_is_the_greedy_search():
    greedy = plain(3)
    x, mask = torch.randn(50, 4), torch.rand(50) > 0.3
    found = torch.stack(greedy._search_beam(torch.where(mask[:, None], x, 0.0), mask), dim=-1)
    exactly(found, greedy.encode(x, mask))


def test_the_beam_has_the_losses_and_gradients_of_its_choice():
    residual = plain(3, beam_size=4)
    x = torch.randn(20, 4, requires_grad=True)
    out = residual(x)
    expected = ResidualQuantizer(list(residual.stages)).quantize_as(x, out.indices)
    exactly(out.quantized, expected.quantized)
    exactly(out.terms, expected.terms)
    both = [x, *residual.parameters()]
    exactly(torch.autograd.grad(out.loss, both), torch.autograd.grad(expected.loss, both))
