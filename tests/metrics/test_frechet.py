"""FrechetDistance against closed forms, and against its formula with a root of ``S1 S2``."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.contracts.observers import NoHostSync
from vqprior.metrics import FrechetDistance


def distance(ours, theirs):
    metric = FrechetDistance(ours.shape[-1])
    metric.update(ours, theirs)
    return metric.compute()


def by_definition(ours, theirs):
    """Heusel et al. 2017, equation 6; the root of a product has the roots of its eigenvalues."""
    ours, theirs = ours.double(), theirs.double()
    gap = (ours.mean(dim=0) - theirs.mean(dim=0)).square().sum()
    one, other = ours.T.cov(), theirs.T.cov()
    roots = torch.linalg.eigvals(one @ other).sqrt().real
    return (gap + one.trace() + other.trace() - 2 * roots.sum()).item()


def correlated(number, dim, generator=None):
    mixed = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    offset = torch.randn(dim, generator=generator, dtype=torch.float64)
    return torch.randn(number, dim, generator=generator, dtype=torch.float64) @ mixed + offset


def with_moments(mean, deviations):
    """A set of exactly this mean, these standard deviations (by n - 1), and no correlations."""
    dim = len(deviations)
    corners = torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    scale = ((2 * dim - 1) / 2) ** 0.5
    return torch.tensor(mean, dtype=torch.float64) + scale * corners * torch.tensor(deviations)


@pytest.mark.parametrize(("number", "other_number", "dim"), [(50, 50, 3), (9, 40, 6), (5, 4, 2)])
def test_is_its_formula(number, other_number, dim):
    ours, theirs = correlated(number, dim), correlated(other_number, dim)
    assert_close(distance(ours, theirs), by_definition(ours, theirs), rtol=1e-9, atol=1e-9)


def test_of_independent_features_is_the_sum_over_them():
    ours = with_moments([1.0, -2.0, 0.0], [1.0, 3.0, 0.5])
    theirs = with_moments([1.5, 1.0, 0.0], [2.0, 3.0, 0.0])
    expected = (0.5**2 + 3**2) + (1 + 0 + 0.5**2)
    assert_close(distance(ours, theirs), expected, rtol=1e-9, atol=1e-9)


def test_of_one_feature_compares_mean_and_standard_deviation():
    ours, theirs = correlated(30, 1), correlated(50, 1)
    gap, spread = ours.mean() - theirs.mean(), ours.std() - theirs.std()
    assert_close(distance(ours, theirs), (gap**2 + spread**2).item())


def test_covariances_divide_by_the_number_minus_one():
    """Of two vectors at -1 and 1 the variance is 2."""
    assert_close(distance(torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1)), 2.0)


@pytest.mark.parametrize("number", [4, 100])
def test_of_equal_sets_is_zero_whatever_their_order(number):
    ours = 10 * correlated(number, 8)
    found = distance(ours, ours.flip(0))
    assert 0 <= found < 1e-9


def test_does_not_depend_on_which_set_is_which():
    ours, theirs = correlated(20, 5), correlated(3, 5)
    assert_close(distance(ours, theirs), distance(theirs, ours))


def test_grows_with_the_square_of_the_unit():
    ours, theirs = correlated(20, 5), correlated(30, 5)
    assert_close(distance(1e-3 * ours, 1e-3 * theirs), 1e-6 * distance(ours, theirs))


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_how_vectors_are_split_into_batches_does_not_matter(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = [sum(size) for size in zip(*sizes, strict=True)]
    sets = [correlated(count, 3, generator) for count in counts]
    parts = [vectors.split([size[side] for size in sizes]) for side, vectors in enumerate(sets)]
    metric = FrechetDistance(3)
    for ours, theirs in zip(*parts, strict=True):
        metric.update(ours, theirs)
    expected = by_definition(*sets) if min(counts) >= 2 else math.nan
    # The root of the oracle turns rounding, 1e-15 of about 10, into 1e-7 where it is singular.
    assert_close(metric.compute(), expected, rtol=1e-9, atol=1e-6, equal_nan=True)
    assert_close(metric.compute(), distance(*sets), rtol=1e-9, atol=1e-9, equal_nan=True)


def test_shape_does_not_matter():
    ours, theirs = torch.randn(24, 3), torch.randn(5, 3)
    metric = FrechetDistance(3)
    metric.update(ours.reshape(2, 3, 4, 3).transpose(0, 1), theirs[:4].reshape(2, 2, 3))
    metric.update(torch.empty(7, 0, 3), theirs[4])
    assert_close(metric.compute(), distance(ours, theirs))


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_large_means_cost_no_digits(batch):
    """Sums of squares near 1e12 in float64 would leave 4 of the 16 digits of a variance."""
    offset = 2.0**20
    # Multiples of 2**-20, so that adding the offset does not round.
    ours, theirs = ((correlated(100, 4) * 2.0**20).round() / 2.0**20 + offset for _ in range(2))
    metric = FrechetDistance(4)
    for pair in zip(ours.split(batch), theirs.split(batch), strict=True):
        metric.update(*pair)
    expected = by_definition(ours - offset, theirs - offset)
    # Means near 1e6 are known to 1e-10, and so is the difference of a few between them.
    assert_close(metric.compute(), expected, rtol=1e-8, atol=1e-8)


def from_centered_vectors(ours, theirs):
    """The same, without covariances: centered vectors ``X / sqrt(n - 1)`` are roots of them."""
    gap = (ours.mean(dim=0) - theirs.mean(dim=0)).square().sum()
    one, other = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (ours, theirs))
    overlap = torch.linalg.svdvals(one @ other.T).sum()
    return (gap + one.square().sum() + other.square().sum() - 2 * overlap).item()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(
    ("number", "other_number", "dim"), [(2, 40, 4), (10, 12, 100), (10, 300, 100), (300, 20, 50)]
)
def test_singular_covariances_cost_no_digits(number, other_number, dim, offset):
    """Had rounding a root, each missing dimension would add 1e-8 of a deviation."""
    ours, theirs = correlated(number, dim) + offset, correlated(other_number, dim) + offset
    expected = from_centered_vectors(ours, theirs)
    # The root of a sum of up to 300 products of float64, and the offset, leave 12 digits.
    assert_close(distance(ours, theirs), expected, rtol=1e-12, atol=0)


def test_sets_without_spread_are_as_far_as_their_means():
    assert distance(torch.ones(5, 3), torch.full((4, 3), 3.0)) == 12.0
    assert distance(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0


@pytest.mark.parametrize(("number", "other_number"), [(0, 0), (0, 9), (1, 9), (9, 1), (9, 0)])
def test_fewer_than_two_vectors_have_no_distance(number, other_number):
    ours, theirs = torch.randn(number, 3), torch.randn(other_number, 3)
    assert math.isnan(distance(ours, theirs))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_vectors_that_are_not_finite_leave_no_distance_until_reset(value, side):
    metric, sets = FrechetDistance(3), [torch.randn(6, 3), torch.randn(6, 3)]
    expected = distance(*sets)
    broken = [vectors.clone() for vectors in sets]
    broken[side][1, 2] = value
    metric.update(*broken)
    metric.update(*sets)
    assert math.isnan(metric.compute())
    metric.reset()
    metric.update(*sets)
    assert_close(metric.compute(), expected)


def test_computing_twice_gives_the_same_and_reset_forgets():
    metric, ours, theirs = FrechetDistance(3), torch.randn(5, 3), torch.randn(6, 3)
    metric.update(ours + 7, theirs)
    before = copy.deepcopy(metric.state_dict())
    assert metric.compute() == metric.compute()
    assert_close(metric.state_dict(), before, rtol=0, atol=0)
    metric.reset()
    assert math.isnan(metric.compute())
    metric.update(ours, theirs)
    assert_close(metric.compute(), distance(ours, theirs))


def test_few_vectors_make_it_too_large_by_what_is_said():
    """Means over 200 draws; the bound is 4 standard errors, the formula errs by about d / n."""
    dim = 3
    for number in (400, 800):
        found = torch.tensor(
            [distance(torch.randn(number, dim), torch.randn(number, dim)) for _ in range(200)]
        )
        error = found.std() / 200**0.5
        assert abs(found.mean() - dim * (dim + 5) / (2 * number)) < 4 * error


def test_narrow_dtypes_and_autocast_do_not_change_the_arithmetic(dtype):
    ours, theirs = torch.randn(20, 4).to(dtype), torch.randn(30, 4).to(dtype)
    metric = FrechetDistance(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(ours, theirs)
        found = metric.compute()
    assert found == distance(ours.double(), theirs.double())


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16])
def test_sums_stay_exact_after_casts(cast):
    metric, ours, theirs = FrechetDistance(4), torch.randn(20, 4), torch.randn(3000, 4)
    metric.update(ours[:7], theirs[:2049])  # 2049 is no float16
    cast(metric).update(ours[7:], theirs[2049:])
    dtypes = {name: buffer.dtype for name, buffer in metric.named_buffers()}
    assert dtypes == {
        "counts": torch.int64,
        "means": torch.float64,
        "scatters": torch.float64,
    }
    assert metric.counts.tolist() == [20, 3000]
    assert_close(metric.compute(), distance(ours, theirs))


def restored(metric):
    fresh = FrechetDistance(metric.dim)
    fresh.load_state_dict(copy.deepcopy(metric.state_dict()), strict=True)
    return fresh


@pytest.mark.parametrize(
    "clone", [restored, copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))]
)
def test_copies_go_on_bit_for_bit(clone):
    metric, ours, theirs = FrechetDistance(4), torch.randn(20, 4), torch.randn(30, 4)
    metric.update(ours[:10], theirs[:5])
    other = clone(metric)
    assert other.compute() == metric.compute()
    for one in (metric, other):
        one.update(ours[10:], theirs[5:])
    assert other.compute() == metric.compute()
    assert_close(metric.compute(), distance(ours, theirs))


def test_no_graph_is_kept():
    metric = FrechetDistance(3)
    metric.update(torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True))
    assert not any(buffer.requires_grad for buffer in metric.buffers())


def test_update_reads_nothing_back_and_changes_no_input():
    metric, ours, theirs = FrechetDistance(3), torch.randn(5, 3), torch.randn(6, 3).double()
    before = ours.clone(), theirs.clone()
    with NoHostSync():
        metric.update(ours, theirs)
        metric.update(ours, theirs)
    assert_close((ours, theirs), before, rtol=0, atol=0)


def test_update_compiles_without_graph_break():
    plain, compiled = FrechetDistance(3), FrechetDistance(3)
    step = torch.compile(compiled.update, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, theirs = torch.randn(5, 3), torch.randn(6, 3)
    for _ in range(2):
        for update in (plain.update, step):
            update(ours, theirs)
    assert_close(plain.compute(), compiled.compute())


def test_computes_on_the_device_it_is_on(device):
    ours, theirs = torch.randn(20, 4), torch.randn(3, 4)
    metric = FrechetDistance(4).to(device)
    metric.update(ours.to(device), theirs.to(device))
    assert_close(metric.compute(), distance(ours, theirs))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            ValueError,
            r"must have shape \(\.\.\., 3\), got \(2, 3, 4, 4\)\. Features come last: for maps "
            r"\(b, d, h, w\), pass `maps\.movedim\(1, -1\)`\.$",
        ),
        (torch.tensor(1.0), ValueError, r"must have shape \(\.\.\., 3\), got \(\)\. Features"),
        (
            torch.zeros(2, 3).byte(),
            TypeError,
            r"must be a floating-point tensor, got torch\.uint8\.$",
        ),
    ],
)
def test_rejects_batches_and_counts_nothing(side, wrong, error, message):
    metric, batches = FrechetDistance(3), [torch.zeros(2, 3), torch.zeros(2, 3)]
    batches[side] = wrong
    with pytest.raises(error, match=f"^`{('ours', 'theirs')[side]}` {message}"):
        metric.update(*batches)
    assert metric.counts.tolist() == [0, 0]


def test_rejects_dimensions():
    with pytest.raises(ValueError, match=r"^`dim` must be at least 1, got 0\.$"):
        FrechetDistance(0)


def test_repr_shows_the_dimension():
    assert repr(FrechetDistance(5)) == "FrechetDistance(5)"
