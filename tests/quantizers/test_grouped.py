"""`GroupedQuantizer`: separate quantizers on shares of the features."""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import (
    FSQ,
    ChannelsFirst,
    CodebookEMA,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ResidualQuantizer,
    TextureQuantizer,
    VectorQuantizer,
)
from vqprior.functional import IndexBackpropagation, nearest_indices
from vqprior.quantizers import _grouped, _plain


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def mixed():
    """Shares of 3, 1 and 2 features with 1, 1 and 2 indices."""
    pair = ResidualQuantizer([VectorQuantizer(2, 16), VectorQuantizer(2, 7)])
    return GroupedQuantizer([VectorQuantizer(3, 5), FSQ([4]), pair])


def test_equals_separate_quantizers():
    grouped = mixed()
    x, mask = torch.randn(4, 6, 6), torch.rand(4, 6) > 0.3
    out = grouped(x, mask)
    first, second, third = [
        group(part, mask)
        for group, part in zip(grouped.groups, (x[..., :3], x[..., 3:4], x[..., 4:]), strict=True)
    ]
    exactly(out.quantized, torch.cat([first.quantized, second.quantized, third.quantized], dim=-1))
    exactly(out.indices[..., 0], first.indices)
    exactly(out.indices[..., 1], second.indices)
    exactly(out.indices[..., 2:], third.indices)
    for name in ("commitment", "codebook"):
        exactly(out.terms[name], first.terms[name] + third.terms[name])
    expected = (*first.selections, *second.selections, *third.selections)
    for ours, theirs in zip(out.selections, expected, strict=True):
        exactly(vars(ours), vars(theirs))
    exactly(grouped.encode(x, mask), out.indices)
    exactly(grouped.decode(out.indices), out.quantized)


def test_sizes_are_those_of_all_groups():
    grouped = mixed()
    assert grouped.dim == 6
    assert grouped.codebook_sizes == (5, 4, 16, 7)
    assert (grouped.num_codebooks, grouped.codebook_size) == (4, 16)
    assert 2**grouped.bits_per_token == pytest.approx(5 * 4 * 16 * 7)
    assert len(grouped.codebooks) == 3


def test_each_share_has_the_gradient_of_its_own_quantizer():
    grouped = mixed()
    x = torch.randn(7, 6, requires_grad=True)
    weight = torch.randn(7, 6)
    (actual,) = torch.autograd.grad((weight * grouped(x).quantized).sum(), x)
    fsq = grouped.groups[1](x[:, 3:4]).quantized
    (middle,) = torch.autograd.grad((weight[:, 3:4] * fsq).sum(), x)
    expected = weight.clone()
    expected[:, 3] = middle[:, 3]
    assert_close(actual, expected)
    assert (middle[:, 3] != weight[:, 3]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("feature", [0, 3, 5])
def test_a_feature_that_is_not_finite_leaves_the_whole_token_out(value, feature):
    grouped, x = mixed(), torch.randn(6, 6)
    x[2, feature] = value
    others = torch.arange(6) != 2
    out, alone = grouped(x), grouped(x[others])
    assert (out.indices[2] == -1).all()
    assert not out.quantized[2].any()
    exactly(out.indices[others], alone.indices)
    assert_close(out.terms, alone.terms)
    exactly(grouped.encode(x), out.indices)
    assert all(not selection.mask[2] for selection in out.selections)
    given = torch.zeros(6, 4, dtype=torch.int64)
    assigned = grouped.quantize_as(x, given)
    assert (assigned.indices[2] == -1).all()
    assert_close(assigned.terms, grouped.quantize_as(x[others], given[others]).terms)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_assign_returns_what_forward_returned(dtype):
    grouped, x = mixed(), torch.randn(8, 6)
    x[0, 0] = torch.nan
    out = grouped(x)
    again = grouped.quantize_as(x, out.indices.clamp_min(0).to(dtype))
    exactly(again.quantized, out.quantized)
    exactly(again.indices, out.indices)
    exactly(again.terms, out.terms)


def test_a_single_missing_index_masks_its_group_alone():
    grouped = GroupedQuantizer([VectorQuantizer(2, 4), VectorQuantizer(2, 4)])
    x = torch.randn(2, 4)
    out = grouped.quantize_as(x, torch.tensor([[1, -1], [-1, 3]]))
    first, second = (group.codebook.codes().detach() for group in grouped.groups)
    nothing = torch.zeros(2)
    expected = torch.stack([torch.cat([first[1], nothing]), torch.cat([nothing, second[3]])])
    exactly(out.quantized, expected)
    exactly(grouped.decode(out.indices), expected)
    errors = [(x[0, :2] - first[1]).square().mean(), (x[1, 2:] - second[3]).square().mean()]
    assert_close(out.terms["commitment"], 0.25 * sum(errors))


def test_logits_are_those_of_the_groups_padded():
    residual = ResidualQuantizer([VectorQuantizer(2, 9), VectorQuantizer(2, 7)])
    grouped = GroupedQuantizer([VectorQuantizer(3, 5), residual])
    x, given = torch.randn(4, 5), torch.randint(5, (4, 3))
    logits = grouped.logits(x, temperature=0.5, indices=given)
    assert logits.shape == (4, 3, 9)
    first = grouped.groups[0].logits(x[:, :3], temperature=0.5)
    rest = residual.logits(x[:, 3:], temperature=0.5, indices=given[:, 1:])
    exactly(logits[:, 0, :5], first)
    exactly(logits[:, 1:], rest)
    assert (logits[:, 0, 5:] == -torch.inf).all()
    exactly(grouped.logits(x).argmax(dim=-1), grouped.encode(x))


def test_a_group_of_one_is_the_quantizer():
    quantizer = VectorQuantizer(4, 16)
    grouped, x = GroupedQuantizer([quantizer]), torch.randn(5, 4)
    exactly(grouped(x).indices, quantizer(x).indices)
    exactly(grouped.logits(x), quantizer.logits(x))
    assert grouped(x).indices.shape == (5,)


def test_a_shared_codebook_is_stored_once_and_learns_from_all_groups():
    shared = VectorQuantizer(2, 8)
    grouped, twin = GroupedQuantizer([shared] * 3), VectorQuantizer(2, 8)
    twin.load_state_dict(shared.state_dict())
    assert list(grouped.state_dict()) == ["groups.unique.0.codebook.weight"]
    x = torch.randn(40, 6)
    CodebookEMA(grouped).step(grouped(x))
    CodebookEMA(twin).step(twin(torch.cat(x.split(2, dim=1))))
    assert_close(shared.codebook.weight, twin.codebook.weight)


VQ = VectorQuantizer(4, 16)


@pytest.mark.parametrize(
    ("quantizers", "error", "message"),
    [
        ([], ValueError, "`quantizers` must hold at least one quantizer, got none."),
        (
            [VQ, nn.Identity()],
            TypeError,
            "`quantizers[1]` must be a quantizer, got Identity. Only the outermost quantizer can "
            "be a `TextureQuantizer`.",
        ),
        (
            [TextureQuantizer(VQ)],
            TypeError,
            "`quantizers[0]` must be a quantizer, got TextureQuantizer. Only the outermost "
            "quantizer can be a `TextureQuantizer`.",
        ),
        (
            [ChannelsFirst(VQ)],
            ValueError,
            "`quantizers[0]` must have features last, got ChannelsFirst. Wrap the outer "
            "quantizer in `ChannelsFirst` instead.",
        ),
        (
            [VQ, MultiScaleQuantizer(VQ, (1, 2))],
            ValueError,
            "`quantizers[1]` must have indices for each token, got MultiScaleQuantizer. Wrap "
            "the outer quantizer in `MultiScaleQuantizer` instead.",
        ),
    ],
)
def test_wrong_arguments(quantizers, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        GroupedQuantizer(quantizers)


@pytest.mark.parametrize("call", ["decode", "quantize_as", "logits"])
def test_indices_of_another_number_of_codebooks(call):
    grouped, indices = mixed(), torch.zeros(3, 2, dtype=torch.int64)
    calls = {
        "decode": lambda: grouped.decode(indices),
        "quantize_as": lambda: grouped.quantize_as(torch.zeros(3, 6), indices),
        "logits": lambda: grouped.logits(torch.zeros(3, 6), indices=indices),
    }
    message = (
        r"^`indices` must have shape \(\.\.\., 4\), one index per codebook, got \(3, 2\)\. "
        r"Use -1 for unknown indices\.$"
    )
    with pytest.raises(ValueError, match=message):
        calls[call]()


def test_other_wrong_calls():
    grouped = GroupedQuantizer([VectorQuantizer(2, 4), FSQ([3, 3])])
    for call in (grouped, grouped.encode, grouped.logits):
        with pytest.raises(ValueError, match=r"^`x` must have shape \(\.\.\., 4\), got \(2, 5\)\."):
            call(torch.zeros(2, 5))
        with pytest.raises(TypeError, match=r"^`x` must be a floating-point tensor, got torch\.in"):
            call(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"explicit codebook for `logits`, got FSQ\."):
        grouped.logits(torch.zeros(2, 4))
    with pytest.raises(
        TypeError, match=r"explicit codebook for `nearest_indices`, got GroupedQuantizer\."
    ):
        grouped.nearest_indices(torch.zeros(2, 4), 1)


def count_searches(monkeypatch):
    """The calls of the search, those of the groups and those of the wrapper."""
    calls = []

    def valid(x, codes, **options):
        calls.append(codes.shape)
        return nearest_indices(x, codes, **options)

    for module in (_grouped, _plain):
        monkeypatch.setattr(module, "nearest_indices", valid)
    return calls


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
def test_groups_of_one_form_are_searched_at_once(monkeypatch, metric):
    quantizers = [VectorQuantizer(3, 16, metric=metric) for _ in range(4)]
    x, mask = torch.randn(4, 6, 12), torch.rand(4, 6) > 0.3
    apart = [q(part, mask) for q, part in zip(quantizers, x.split(3, dim=-1), strict=True)]
    grouped = GroupedQuantizer(quantizers)
    calls = count_searches(monkeypatch)
    out = grouped(x, mask)
    exactly(grouped.encode(x, mask), out.indices)
    assert calls == [(4, 16, 3)] * 2
    exactly(out.indices, torch.stack([each.indices for each in apart], dim=-1))
    exactly(out.quantized, torch.cat([each.quantized for each in apart], dim=-1))
    assert_close(out.loss, sum(each.loss for each in apart))


@pytest.mark.parametrize(
    "others",
    [
        lambda: [VectorQuantizer(3, 16), VectorQuantizer(3, 8)],
        lambda: [VectorQuantizer(3, 16), VectorQuantizer(2, 16)],
        lambda: [VectorQuantizer(3, 16), VectorQuantizer(3, 16, metric="cosine")],
        lambda: [VectorQuantizer(3, 16), FSQ([4, 4, 4])],
        lambda: [VectorQuantizer(3, 16), ResidualQuantizer([VectorQuantizer(3, 16)])],
        lambda: [VectorQuantizer(3, 16, estimator=IndexBackpropagation())] * 2,
    ],
    ids=["sizes", "dims", "metrics", "no-codebook", "wrapped", "own-choice"],
)
def test_groups_of_several_forms_are_searched_each(monkeypatch, others):
    grouped = GroupedQuantizer(others())
    calls = count_searches(monkeypatch)
    grouped(torch.randn(5, grouped.dim))
    assert all(len(shape) == 2 for shape in calls)
