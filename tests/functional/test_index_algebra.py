"""Mixed radix, against Python's unbounded integers."""

import itertools
import math
import random
import re

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.observers import NoHostSync
from vqprior.functional import join_indices, split_indices

LEVELS = [
    (1,),
    (7,),
    (8, 5, 5, 5),
    (1, 3, 1, 2),
    (512, 512),
    (2,) * 62,
    (2**31, 2**31),
    (2**62,),
    (3**19, 3**20),
    (1,) * 80,
]
every_levels = pytest.mark.parametrize("levels", LEVELS, ids=lambda ls: f"{len(ls)}-{ls[0]}")


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def join_by_definition(digits, levels):
    return sum(digit * math.prod(levels[:place]) for place, digit in enumerate(digits))


@every_levels
def test_join_is_the_sum_of_digits_times_strides(levels):
    generator = random.Random(0)
    rows = [[generator.randrange(level) for level in levels] for _ in range(20)]
    rows += [[level - 1 for level in levels], [0] * len(levels)]
    expected = torch.tensor([join_by_definition(row, levels) for row in rows])
    exactly(join_indices(torch.tensor(rows), levels), expected)


@every_levels
def test_split_is_the_inverse(levels):
    generator = random.Random(0)
    size = math.prod(levels)
    indices = [generator.randrange(size) for _ in range(20)] + [0, size - 1]
    digits = split_indices(torch.tensor(indices), levels)
    assert [join_by_definition(row, levels) for row in digits.tolist()] == indices
    assert (digits >= 0).all()
    assert (digits < torch.tensor(levels)).all()
    exactly(join_indices(digits, levels), torch.tensor(indices))


def test_all_indices_of_a_small_space_in_order():
    digits = [row[::-1] for row in itertools.product(range(5), range(3), range(2))]
    exactly(split_indices(torch.arange(30), (2, 3, 5)), torch.tensor(digits))


def test_minus_one_stays_minus_one():
    digits = torch.tensor([[-1, 0, 3], [1, -1, 0], [1, 2, -1], [-1, -1, -1], [1, 2, 3]])
    exactly(join_indices(digits, (2, 3, 4)), torch.tensor([-1, -1, -1, -1, 23]))
    exactly(
        split_indices(torch.tensor([-1, 23]), (2, 3, 4)), torch.tensor([[-1, -1, -1], [1, 2, 3]])
    )


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_leading_dimensions_and_dtypes_are_free(leading, dtype):
    digits = torch.full((*leading, 3), 99, dtype=dtype)
    joined = join_indices(digits, (100, 100, 100))
    exactly(joined, torch.full(leading, 999_999))
    exactly(split_indices(joined, (100, 100, 100)), digits.long())
    exactly(split_indices(torch.full(leading, 7, dtype=dtype), (4, 4)), split_7(leading))


def split_7(leading):
    return torch.tensor([3, 1]).expand(*leading, 2).contiguous()


def test_compiles_in_one_graph_without_waiting():
    torch.compiler.reset()
    indices, levels = torch.randint(-1, 1000, (50,)), (8, 5, 25)

    def there_and_back(indices):
        digits = split_indices(indices, levels)
        return digits, join_indices(digits, levels)

    digits, joined = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(indices)
    exactly(joined, indices)
    with NoHostSync():
        expected = there_and_back(indices)
    exactly(digits, expected[0])


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), "`levels` must hold at least one level, got none."),
        ((3, 0), "`levels` must be at least 1, got 0."),
        (
            (2**31, 2**32),
            "`levels` must have a product of at most 2**62, got 9223372036854775808. Join "
            "fewer digits, or keep them separate.",
        ),
    ],
)
def test_wrong_levels(levels, message):
    for call in (
        lambda: join_indices(torch.zeros(2, len(levels)).long(), levels),
        lambda: split_indices(torch.zeros(2).long(), levels),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize("shape", [(), (2,), (3, 2)])
def test_wrong_number_of_digits(shape):
    message = f"`digits` must have shape (..., 3), one entry for each level, got {shape}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        join_indices(torch.zeros(shape).long(), (2, 2, 2))


def test_fractions_are_no_indices():
    with pytest.raises(TypeError, match=r"^`digits` must be an integer tensor, got torch.float32"):
        join_indices(torch.zeros(2, 1), (3,))
    with pytest.raises(TypeError, match=r"^`indices` must be an integer tensor, got torch.float32"):
        split_indices(torch.zeros(2), (3,))
