"""The transforms of ``torch.func`` through functions and losses."""

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from vqprior import Selection
from vqprior.functional import (
    bit_entropy_loss,
    code_sums_and_counts,
    distance_cross_entropy,
    entropy_loss,
    gram_loss,
    index_cross_entropy,
    nearest_indices,
    orthogonality_loss,
    rotation_trick,
    select_codes,
    straight_through,
    symmetric_vq_loss,
    unused_code_loss,
)
from vqprior.losses import FilterBankLoss

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]
CODES = torch.arange(28.0).reshape(7, 4).sin()
INDICES = torch.tensor([0, 6, -1, 2, 2])


def selection(x):
    return Selection(inputs=x, codes=x.sin(), indices=INDICES, mask=INDICES >= 0)


def image(x):
    return x.flatten()[:8].sigmoid().expand(1, 3, 8, 8)


# Functions of five vectors of four features.
FUNCTIONS = {
    "select": lambda x: select_codes(x @ CODES.T, CODES)[0],
    "select-soft": lambda x: select_codes(x @ CODES.T, CODES, estimator="soft")[0],
    "select-among": lambda x: select_codes(CODES[:3] @ x.T.detach(), x)[0],
    "select-soft-among": lambda x: select_codes(CODES[:3] @ x.T, x, estimator="soft")[0],
    "straight-through": lambda x: straight_through(x, CODES[:5]),
    "rotation": lambda x: rotation_trick(x, CODES[:5]),
    "index-cross-entropy": lambda x: index_cross_entropy(x @ CODES.T, INDICES),
    "distance-cross-entropy": lambda x: distance_cross_entropy(x @ CODES.T, INDICES, CODES),
    "entropy": lambda x: entropy_loss(x @ CODES.T),
    "bit-entropy": bit_entropy_loss,
    "orthogonality": orthogonality_loss,
    "gram": lambda x: gram_loss(selection(x)),
    "symmetric": lambda x: symmetric_vq_loss(selection(x)),
    "unused-codes": lambda x: unused_code_loss(selection(x), torch.cat([x, x]).cos()),
    "filter-bank": lambda x: FilterBankLoss(num_scales=1)(image(x), image(x).detach() / 2),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def weighted(function):
    return lambda x: (
        function(x) * torch.linspace(1, 2, function(x).numel()).view_as(function(x))
    ).sum()


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@every_function
def test_gradients_of_samples_and_directions_are_those_of_autograd(function):
    function = weighted(function)
    torch.manual_seed(0)
    xs, direction = torch.randn(3, 5, 4), torch.randn(5, 4)
    expected = torch.stack([gradient(function, x) for x in xs])
    assert_close(vmap(grad(function))(xs), expected)
    assert_close(grad(lambda xs: vmap(function)(xs).sum())(xs), expected)
    _, found = jvp(function, (xs[0],), (direction,))
    assert_close(found.float(), (expected[0] * direction).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [(), (2,)], ids=["one-codebook", "two"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("num_nearest", [1, 3])
def test_search_maps_over_vectors_and_codes(tail, leading, num_nearest):
    x, codes = torch.randn(4, *leading, *tail, 6), torch.randn(4, *tail, 9, 6)

    def search(x, codes):
        return nearest_indices(x, codes, num_nearest=num_nearest)

    def one_by_one(xs, tables):
        return torch.stack([search(a, b) for a, b in zip(xs, tables, strict=True)])

    pairs = one_by_one(x, codes)
    assert torch.equal(vmap(search)(x, codes), pairs)
    assert torch.equal(vmap(search, (-1, 1))(x.movedim(0, -1), codes.movedim(0, 1)), pairs)
    assert torch.equal(vmap(search, (None, 0))(x[0], codes), one_by_one([x[0]] * 4, codes))
    assert torch.equal(vmap(search, (0, None))(x, codes[0]), one_by_one(x, [codes[0]] * 4))
    nested = vmap(vmap(search, (None, 0)), (0, None))(x, codes)
    assert torch.equal(nested, torch.stack([one_by_one([one] * 4, codes) for one in x]))


def test_statistics_map_over_samples():
    x, indices = torch.randn(4, 10, 3), torch.randint(-1, 5, (4, 10))
    expected = [code_sums_and_counts(*pair, 5) for pair in zip(x, indices, strict=True)]
    found = vmap(code_sums_and_counts, (0, 0, None))(x, indices, 5)
    assert_close(found, torch.stack(expected), rtol=0, atol=0)
    assert vmap(code_sums_and_counts, (None, 0, None))(x[0], indices, 5).shape == (4, 5, 4)
