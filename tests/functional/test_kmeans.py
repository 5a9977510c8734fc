"""`kmeans`: Lloyd's algorithm, and the cases in which textbooks divide by zero."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from vqprior.functional import kmeans, nearest_indices


def lloyd_by_definition(x, means, iterations):
    for _ in range(iterations):
        choice = (x[:, None] - means).square().sum(-1).argmin(-1)
        means = torch.stack([x[choice == j].mean(dim=0) for j in range(len(means))])
    return means


def test_matches_the_loop_written_by_hand():
    x = torch.randn(200, 2, dtype=torch.float64)
    generator = torch.Generator()
    start = kmeans(x, 5, iterations=0, generator=generator.manual_seed(1))
    means = kmeans(x, 5, iterations=7, generator=generator.manual_seed(1))
    assert_close(means, lloyd_by_definition(x, start, 7))


@pytest.mark.parametrize("seed", range(5))
def test_two_clear_clusters_are_found(seed):
    left, right = torch.randn(50, 3) - 100, torch.randn(150, 3) + 100
    means = kmeans(torch.cat([left, right]), 2, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([left.mean(dim=0), right.mean(dim=0)])
    assert_close(means[means[:, 0].argsort()], expected)


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_with_as_many_codes_as_vectors_each_is_a_code(iterations):
    x = torch.randn(8, 2)
    means = kmeans(x, 8, iterations=iterations)
    assert_close(means[means[:, 0].argsort()], x[x[:, 0].argsort()], rtol=0, atol=0)


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_more_codes_than_vectors_repeat_the_vectors(iterations):
    x = torch.randn(3, 2)
    means = kmeans(x, 10, iterations=iterations)
    assert means.shape == (10, 2)
    assert_close(means.unique(dim=0), x.unique(dim=0))


def test_with_few_distinct_vectors_all_of_them_are_found():
    """Random starts fall onto duplicates; empty clusters move to what is left."""
    x = torch.cat([torch.zeros(1000, 2), torch.tensor([[5.0, 5.0], [9.0, 0.0], [0.0, 7.0]])])
    means = kmeans(x, 6)
    assert means.isfinite().all()
    assert_close(torch.cdist(x, means).amin(dim=1), torch.zeros(1003))


def test_identical_vectors_give_identical_means():
    x = torch.full((20, 3), 0.1)
    assert_close(kmeans(x, 4), x[:4])


def test_no_cluster_stays_empty():
    x = torch.cat([torch.randn(500, 2), 1000 + torch.randn(10, 2)])
    means = kmeans(x, 16, iterations=20)
    assert torch.cdist(x, means).argmin(dim=1).unique().numel() == 16


def test_the_error_never_grows():
    x = torch.randn(300, 4)
    errors = []
    for iterations in range(12):
        means = kmeans(x, 9, iterations=iterations, generator=torch.Generator().manual_seed(0))
        errors.append(torch.cdist(x, means).amin(dim=1).square().mean().item())
    # Equal up to rounding once it has converged.
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_massive_vector_costs_the_others_no_accuracy(offset):
    x = offset + torch.randint(-16, 17, (2000, 2)).float() / 4
    x[7] = 1e6
    means = kmeans(x, 16, generator=torch.Generator().manual_seed(0)).double()
    distances = torch.cdist(x.double(), means, compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.gather(1, nearest_indices(x, means.float()).unsqueeze(1)).squeeze(1)
    assert_close(chosen, distances.amin(dim=1), rtol=0, atol=1e-6)
    others = torch.arange(2000) != 7
    errors = chosen[others].square().mean()
    alone = kmeans(x[others], 15, generator=torch.Generator().manual_seed(0)).double()
    assert errors < 1.3 * torch.cdist(x[others].double(), alone).amin(dim=1).square().mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_vectors_are_left_out(value):
    x = torch.randn(50, 3)
    generator = torch.Generator()
    expected = kmeans(x, 4, generator=generator.manual_seed(0))
    spoiled = torch.cat([x[:20], torch.tensor([[0.0, value, 0.0]]), x[20:]])
    assert_close(kmeans(spoiled, 4, generator=generator.manual_seed(0)), expected, rtol=0, atol=0)


def test_a_generator_decides_alone():
    x, rng = torch.randn(100, 2), torch.get_rng_state()
    first = kmeans(x, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), rng)
    assert_close(kmeans(x, 5, generator=torch.Generator().manual_seed(7)), first, rtol=0, atol=0)
    assert (kmeans(x, 5, generator=torch.Generator().manual_seed(8)) != first).any()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_means_are_float32_or_wider(dtype, expected):
    assert kmeans(torch.randn(2, 20, 3).to(dtype), 4).dtype == expected


def test_no_gradient():
    assert not kmeans(torch.randn(20, 3, requires_grad=True), 4).requires_grad


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (
            torch.ones(3, 2).long(),
            {},
            TypeError,
            r"^`x` must be a floating-point tensor, got torch\.int64\.$",
        ),
        (torch.tensor(1.0), {}, ValueError, r"^`x` must have shape \(\.\.\., d\), got \(\)\.$"),
        (
            torch.ones(0, 2),
            {},
            ValueError,
            r"^`x` must hold at least one finite vector, got \(0, 2\)\.$",
        ),
        (
            torch.full((3, 2), torch.nan),
            {},
            ValueError,
            r"^`x` must hold at least one finite vector, got \(3, 2\)\.$",
        ),
        (
            torch.ones(3, 2),
            {"num_codes": 0},
            ValueError,
            r"^`num_codes` must be at least 1, got 0\.$",
        ),
        (
            torch.ones(3, 2),
            {"iterations": -1},
            ValueError,
            r"^`iterations` must be at least 0, got -1\.$",
        ),
    ],
)
def test_wrong_arguments(x, options, error, message):
    with pytest.raises(error, match=message):
        kmeans(x, options.pop("num_codes", 2), **options)
