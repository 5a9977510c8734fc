"""`FSQ`: the paper's formulas, the whole code space, ties, saturation."""

import itertools
import math
import re

import pytest
import torch
from torch.testing import assert_close

from vqprior import FSQ, GroupedQuantizer

LEVELS = [[8, 5, 2, 7], [8, 5, 3, 7], [3], [2], [4, 4], [6, 3, 9]]


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def of_the_paper(x, levels):
    """Equation 1 and listing 1 of appendix A.1, number by number in float64."""
    quantized, bounded, index = [], [], 0
    for value, level in zip(reversed(x), reversed(levels), strict=True):
        half = (level - 1) * (1 + 1e-3) / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        shift = math.atanh(offset / half)
        bounded.append(math.tanh(value + shift) * half - offset)
        rounded = round(bounded[-1])
        quantized.append(rounded / (level // 2))
        index = index * level + rounded + level // 2
    return (
        quantized[::-1],
        index,
        [b / (level // 2) for b, level in zip(bounded[::-1], levels, strict=True)],
    )


def symmetric_form(x, levels):
    """The nearest of evenly spaced values from -1 to 1."""
    quantized, index = [], 0
    for value, level in zip(reversed(x), reversed(levels), strict=True):
        values = [-1 + 2 * digit / (level - 1) for digit in range(level)]
        errors = [abs(math.tanh(value) - v) for v in values]
        digit = errors.index(min(errors))
        quantized.append(values[digit])
        index = index * level + digit
    return quantized[::-1], index, [math.tanh(value) for value in x]


FORMS = {False: of_the_paper, True: symmetric_form}
CASES = [
    (levels, symmetric) for levels in LEVELS for symmetric in FORMS if symmetric or 2 not in levels
]
every_case = pytest.mark.parametrize(("levels", "symmetric"), CASES, ids=str)
both_forms = pytest.mark.parametrize("symmetric", [False, True], ids=["paper", "symmetric"])


@every_case
def test_matches_the_formula(levels, symmetric):
    def formula(inputs):
        rows = [FORMS[symmetric](row, levels)[:2] for row in inputs.double().tolist()]
        return torch.tensor([value for value, _ in rows]), torch.tensor([i for _, i in rows])

    x = 2 * torch.randn(300, len(levels))
    out, (quantized, indices) = FSQ(levels, symmetric=symmetric)(x), formula(x)
    # Between two levels, the last bit of a float32 decides.
    clear = (formula(x - 1e-3)[1] == indices) & (formula(x + 1e-3)[1] == indices)
    assert clear.float().mean() > 0.95
    exactly(out.indices[clear], indices[clear])
    assert_close(out.quantized[clear], quantized[clear])
    assert (out.loss, out.terms, out.selections) == (0, {}, ())


@every_case
def test_the_gradient_is_that_of_the_bounded_features(levels, symmetric):
    x = torch.randn(50, len(levels), dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    out = FSQ(levels, symmetric=symmetric)(x)
    (actual,) = torch.autograd.grad((weight * out.quantized).sum(), x)
    step = 1e-6

    def bounded(inputs):
        return torch.tensor(
            [FORMS[symmetric](row, levels)[2] for row in inputs.tolist()], dtype=torch.float64
        )

    numeric = (bounded(x.detach() + step) - bounded(x.detach() - step)) / (2 * step)
    assert_close(actual, weight * numeric, rtol=1e-6, atol=1e-8)  # the error of the difference


@every_case
def test_every_code_is_reached_and_every_index_survives_a_round_trip(levels, symmetric):
    fsq = FSQ(levels, symmetric=symmetric)
    everything = torch.arange(math.prod(levels))
    codes = fsq.decode(everything)
    assert codes.unique(dim=0).shape == (math.prod(levels), len(levels))
    assert codes.abs().max() <= 1
    # Codes lie on the levels; what is bounded to them is found by the inverse of the bound.
    if symmetric:
        inputs = codes.double().clamp(-1 + 1e-9, 1 - 1e-9).atanh()
    else:
        counts = torch.tensor(levels)
        half = (counts - 1).double() * 1.001 / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0).double()
        inputs = ((codes.double() * (counts // 2) + offset) / half).atanh() - (
            offset / half
        ).atanh()
    exactly(fsq.encode(inputs), everything)


def test_the_first_feature_varies_fastest():
    fsq = FSQ([3, 5, 2], symmetric=True)
    grid = torch.tensor(list(itertools.product([-9.0, 9.0], [-9.0, 0.0, 9.0], [-9.0, 0.0, 9.0])))
    indices = fsq.encode(grid.flip(1))
    assert indices.tolist() == [
        i + 3 * j + 15 * k for k in (0, 1) for j in (0, 2, 4) for i in range(3)
    ]
    assert_close(fsq.decode(torch.tensor(1)), torch.tensor([0.0, -1.0, -1.0]))
    assert_close(fsq.decode(torch.tensor(3)), torch.tensor([-1.0, -0.5, -1.0]))


def test_even_numbers_have_a_level_at_zero_unless_symmetric():
    x = torch.zeros(1, 1)
    assert FSQ([4])(x).quantized.item() == 0.0
    assert_close(FSQ([4]).decode(torch.arange(4)).flatten(), torch.tensor([-1.0, -0.5, 0.0, 0.5]))
    thirds = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])
    assert_close(FSQ([4], symmetric=True).decode(torch.arange(4)).flatten(), thirds)


@pytest.mark.parametrize("level", [2, 4, 6, 8, 10])
def test_ties_go_to_the_lower_level(level):
    """Zero lies halfway between the two levels in the middle."""
    assert FSQ([level], symmetric=True).encode(torch.zeros(1, 1)).item() == level // 2 - 1


@both_forms
@pytest.mark.parametrize("level", [3, 8, 999, 1000, 1001, 1002, 4096, 5001, 65536])
@pytest.mark.parametrize("value", [20.0, 1e4, 3e38])
def test_saturation_ends_at_the_outermost_levels(level, value, symmetric):
    """Above a thousand levels, the little more of the paper is more than half a level."""
    fsq = FSQ([level], symmetric=symmetric)
    x = torch.tensor([[-value], [value]], requires_grad=True)
    out = fsq(x)
    assert out.indices.tolist() == [0, level - 1]
    exactly(fsq.decode(out.indices), out.quantized)
    out.quantized.sum().backward()
    exactly(x.grad, torch.zeros(2, 1))


@both_forms
def test_the_largest_code_space(symmetric):
    levels = [2**20, 2**20, 2**20, 4]
    fsq = FSQ(levels, symmetric=symmetric)
    assert (fsq.codebook_size, fsq.bits_per_token) == (2**62, 62.0)
    x = torch.cat([torch.full((1, 4), 50.0), torch.full((1, 4), -50.0), torch.randn(50, 4)])
    out = fsq(x)
    assert out.indices[:2].tolist() == [2**62 - 1, 0]
    exactly(fsq.decode(out.indices), out.quantized)


def test_levels_are_not_saved_and_casts_leave_them_alone():
    fsq = FSQ([8, 1001])
    assert not fsq.state_dict()
    assert not list(fsq.parameters())
    x = torch.randn(200, 2)
    exactly(fsq.half()(x).indices, FSQ([8, 1001])(x).indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_rounded_in_float32(dtype):
    x, fsq = torch.randn(300, 2).to(dtype), FSQ([40, 41])
    exactly(fsq(x).indices, fsq(x.float()).indices)
    with torch.autocast("cpu", dtype=dtype):
        exactly(fsq(x).indices, fsq.encode(x.float()))


def test_several_side_by_side_pass_the_limit():
    grouped = GroupedQuantizer([FSQ([2**22, 2**20, 2**20]), FSQ([2**22, 2**20, 2**20])])
    assert grouped.bits_per_token == 124.0
    x = torch.randn(5, 6)
    exactly(grouped.decode(grouped.encode(x)), grouped(x).quantized)


def test_assign_has_the_gradient_of_the_input_at_the_code_given():
    fsq, x = FSQ([5, 5]), torch.randn(4, 2, requires_grad=True)
    given = torch.tensor([3, 24, -1, 0])
    out = fsq.quantize_as(x, given)
    exactly(out.indices, given)
    exactly(out.quantized, fsq.decode(given))
    valid = (given >= 0).unsqueeze(1)
    (expected,) = torch.autograd.grad((valid * fsq(x).quantized).sum(), x)
    exactly(torch.autograd.grad(out.quantized.sum(), x)[0], expected)


def test_repr_shows_options():
    assert repr(FSQ([8, 5], symmetric=True)) == "FSQ([8, 5], symmetric=True)"


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "`levels` must hold at least one number of levels, got none."),
        ([5, 1], "`levels` must be at least 2, got 1."),
        (
            [2**21, 2**21, 2**21],
            "`levels` must have a product of at most 2**62, got [2097152, 2097152, 2097152]. For "
            "more codes, combine several in a `GroupedQuantizer`.",
        ),
        ([3, 2**22 + 1], "`levels` must be at most 2**22 each, got 4194305."),
        (
            [3, 2],
            "`levels` must be at least 3, got 2. Pass `symmetric=True`: otherwise nearly all "
            "values round to one of the two levels.",
        ),
    ],
)
def test_wrong_arguments(levels, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FSQ(levels)


def test_there_is_no_codebook_to_rank():
    for call in (
        lambda: FSQ([3]).logits(torch.zeros(1, 1)),
        lambda: FSQ([3]).nearest_indices(torch.zeros(1, 1), 1),
    ):
        with pytest.raises(
            TypeError, match=r"must have one explicit codebook for `\w+`, got FSQ\."
        ):
            call()
