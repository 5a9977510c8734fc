"""`ProjectedQuantizer`: two modules around a quantizer, their gradients, masks and dtypes."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import (
    LFQ,
    EmbeddingCodebook,
    MultiScaleQuantizer,
    NormalizedCodebook,
    ProjectedQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)
from vqprior.functional import rotation_trick
from vqprior.nn import L2Norm


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def linear(inner, dim=6):
    return ProjectedQuantizer(inner, nn.Linear(dim, inner.dim), nn.Linear(inner.dim, dim))


def residual():
    return ResidualQuantizer([VectorQuantizer(2, 8), VectorQuantizer(2, 8)])


def test_equals_down_quantizer_up():
    inner = VectorQuantizer(3, 16)
    projected, x = linear(inner), torch.randn(2, 9, 6)
    expected = inner(F.linear(x, projected.down.weight, projected.down.bias))
    out = projected(x)
    exactly(out.quantized, F.linear(expected.quantized, projected.up.weight, projected.up.bias))
    exactly(out.indices, expected.indices)
    exactly(out.terms, expected.terms)
    exactly(vars(out.selections[0]), vars(expected.selections[0]))
    exactly(projected.encode(x), expected.indices)
    exactly(projected.nearest_indices(x, 4), inner.nearest_indices(projected.down(x), 4))
    exactly(projected.logits(x, temperature=2.0), inner.logits(projected.down(x), temperature=2.0))


@pytest.mark.parametrize("make", [lambda: VectorQuantizer(3, 16), lambda: LFQ(3), residual])
def test_the_gradient_of_the_input_passes_up_and_down(make):
    projected = linear(make())
    x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(9, 6)
    (actual,) = torch.autograd.grad((weight * projected(x).quantized).sum(), x)
    assert_close(actual, weight @ projected.up.weight @ projected.down.weight)


def test_down_and_up_learn_from_the_result():
    projected, x, weight = linear(VectorQuantizer(3, 16)), torch.randn(9, 6), torch.randn(9, 6)
    out = projected(x)
    modules = [*projected.down.parameters(), *projected.up.parameters()]
    actual = torch.autograd.grad((weight * out.quantized).sum(), modules)
    inner = weight @ projected.up.weight.detach()
    codes = projected.quantizer.decode(out.indices).detach()
    assert_close(actual, (inner.T @ x, inner.sum(dim=0), weight.T @ codes, weight.sum(dim=0)))


def test_the_estimator_acts_between_the_modules():
    projected = linear(VectorQuantizer(3, 16, estimator=rotation_trick))
    x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(9, 6)
    out = projected(x)
    lowered = projected.down(x)
    rotated = rotation_trick(lowered, projected.quantizer.decode(out.indices))
    (expected,) = torch.autograd.grad((weight * projected.up(rotated)).sum(), x)
    assert_close(torch.autograd.grad((weight * out.quantized).sum(), x)[0], expected)


def test_frozen_modules_pass_the_gradient_on():
    projected = linear(VectorQuantizer(3, 16))
    projected.down.requires_grad_(requires_grad=False)
    projected.up.requires_grad_(requires_grad=False)
    x = torch.randn(9, 6, requires_grad=True)
    out = projected(x)
    (out.loss + out.quantized.sum()).backward()
    assert x.grad.abs().sum() > 0
    assert projected.quantizer.codebook.weight.grad.any()
    assert all(p.grad is None for p in (*projected.down.parameters(), *projected.up.parameters()))


@pytest.mark.parametrize("make", [lambda: VectorQuantizer(2, 8), residual, lambda: LFQ(2)])
def test_masked_tokens_are_zero_although_up_has_a_bias(make):
    projected = linear(make())
    nn.init.constant_(projected.up.bias, 7.0)
    x, mask = torch.randn(5, 6), torch.tensor([True, False, True, True, False])
    x[2, 3] = torch.nan
    valid = torch.tensor([True, False, False, True, False])
    out = projected(x, mask)
    assert not out.quantized[~valid].any()
    assert (out.quantized[valid].abs() > 0).all()
    exactly(projected.decode(out.indices), out.quantized)
    assigned = projected.quantize_as(x, out.indices)
    exactly(assigned.quantized, out.quantized)
    exactly(assigned.indices, out.indices)
    exactly(assigned.terms, out.terms)
    out.quantized.sum().backward()
    exactly(projected.up.bias.grad, torch.full((6,), 2.0))  # one for each counted token


def test_a_token_with_some_index_is_projected_up():
    projected = linear(residual())
    indices = torch.tensor([[3, -1], [-1, 5], [-1, -1]])
    first, second = (stage.codebook.codes() for stage in projected.quantizer.stages)
    expected = projected.up(torch.stack([first[3], second[5]]))
    decoded = projected.decode(indices)
    assert_close(decoded[:2], expected)
    assert not decoded[2].any()
    assert_close(projected.quantize_as(torch.randn(3, 6), indices).quantized, decoded)


@pytest.mark.parametrize("make", [lambda: VectorQuantizer(2, 8), residual])
def test_assign_leaves_out_what_is_not_finite_in_small_dtypes_too(make):
    projected = linear(make())
    x = torch.randn(3, 6)
    x[1, 0] = torch.inf
    given = torch.zeros_like(projected.encode(x)).to(torch.uint8)
    out = projected.quantize_as(x, given)
    assert (out.indices[1] == -1).all()
    assert (out.indices[[0, 2]] == 0).all()
    assert_close(out.terms, projected.quantize_as(x[[0, 2]], given[[0, 2]]).terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_modules_run_in_their_own_dtype(dtype):
    """The lowered vectors of a float32 module are those of the wide input, not of the narrow."""
    projected = linear(VectorQuantizer(3, 256))
    x = torch.randn(500, 6).to(dtype)
    out, wide = projected(x), projected(x.float())
    exactly(out.indices, wide.indices)
    exactly(out.terms, wide.terms)
    exactly(out.quantized, wide.quantized.to(dtype))
    exactly(projected.decode(out.indices).to(dtype), out.quantized)
    assert projected.decode(out.indices).dtype == torch.float32


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_index(low):
    projected = linear(VectorQuantizer(3, 256))
    x = torch.randn(500, 6)
    expected = projected(x)
    with torch.autocast("cpu", dtype=low):
        assert F.linear(x, projected.down.weight).dtype == low  # it would otherwise
        out, decoded = projected(x), projected.decode(expected.indices)
        encoded, logits = projected.encode(x), projected.logits(x)
    exactly(out.indices, expected.indices)
    exactly(encoded, expected.indices)
    exactly(out.quantized, expected.quantized)
    exactly(decoded, expected.quantized)
    exactly(out.terms, expected.terms)
    exactly(logits, projected.logits(x))


def test_unit_vectors_against_unit_codes():
    """Factorized codes of ViT-VQGAN: half of the squared distance is one less the cosine."""
    inner = VectorQuantizer(
        4, 16, metric="cosine", codebook=NormalizedCodebook(EmbeddingCodebook(16, 4))
    )
    projected, x = ProjectedQuantizer(inner, L2Norm(), nn.Identity()), 9 * torch.randn(50, 4)
    out = projected(x)
    cosines = F.normalize(x, dim=1) @ inner.codebook.codes().T
    exactly(out.indices, cosines.argmax(dim=1))
    assert_close(out.terms["commitment"], 0.25 * (2 - 2 * cosines.amax(dim=1)).mean() / 4)


@pytest.mark.parametrize(
    ("options", "down", "dim"),
    [
        ({}, nn.Linear(6, 3), 6),
        ({"dim": 5}, nn.Sequential(nn.Linear(5, 3)), 5),
        ({}, nn.Identity(), 3),
        ({}, nn.Sequential(nn.Linear(3, 3), nn.Tanh()), 3),
    ],
)
def test_where_dim_comes_from(options, down, dim):
    projected = ProjectedQuantizer(VectorQuantizer(3, 16), down, nn.Linear(3, dim), **options)
    assert projected.dim == dim
    assert projected(torch.randn(4, dim)).quantized.shape == (4, dim)
    assert (projected.codebook_sizes, projected.bits_per_token) == ((16,), 4.0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^`dim` must be at least 1, got 0\.$"):
        ProjectedQuantizer(VectorQuantizer(3, 16), nn.Identity(), nn.Identity(), dim=0)
    message = (
        r"^`quantizer` must have indices for each token, got MultiScaleQuantizer\. Wrap "
        r"the outer quantizer in `MultiScaleQuantizer` instead\.$"
    )
    with pytest.raises(ValueError, match=message):
        ProjectedQuantizer(
            MultiScaleQuantizer(VectorQuantizer(3, 16), (1, 2)), nn.Identity(), nn.Identity()
        )


CALLS = ["forward", "encode", "logits", "nearest_indices", "quantize_as"]


def call(projected, name, x):
    arguments = {
        "nearest_indices": (2,),
        "quantize_as": (torch.zeros(x.shape[:-1], dtype=torch.int64),),
    }
    return getattr(projected, name)(x, *arguments.get(name, ()))


@pytest.mark.parametrize("name", CALLS)
def test_a_down_of_the_wrong_size(name):
    projected = ProjectedQuantizer(VectorQuantizer(3, 16), nn.Linear(6, 4), nn.Linear(3, 6))
    with pytest.raises(ValueError, match=r"^`down\(x\)` must have shape \(2, 3\), got \(2, 4\)\.$"):
        call(projected, name, torch.zeros(2, 6))


@pytest.mark.parametrize("name", ["forward", "quantize_as"])
def test_an_up_of_the_wrong_size(name):
    projected = ProjectedQuantizer(VectorQuantizer(3, 16), nn.Linear(6, 3), nn.Linear(3, 5))
    message = r"^`up\(codes\)` must have shape \(2, 6\), got \(2, 5\)\.$"
    with pytest.raises(ValueError, match=message):
        call(projected, name, torch.zeros(2, 6))


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_input(name):
    projected = linear(VectorQuantizer(3, 16))
    with pytest.raises(ValueError, match=r"^`x` must have shape \(\.\.\., 6\), got \(2, 5\)\."):
        call(projected, name, torch.zeros(2, 5))
    message = re.escape("`x` must be a floating-point tensor, got torch.int64.")
    with pytest.raises(TypeError, match=f"^{message}$"):
        call(projected, name, torch.zeros(2, 6, dtype=torch.int64))


def test_what_the_quantizer_cannot_do():
    with pytest.raises(TypeError, match=r"explicit codebook for `logits`, got LFQ\."):
        linear(LFQ(3)).logits(torch.zeros(2, 6))
    with pytest.raises(
        TypeError, match=r"explicit codebook for `nearest_indices`, got ResidualQuantizer\."
    ):
        linear(residual()).nearest_indices(torch.zeros(2, 6), 2)
    with pytest.raises(ValueError, match=r"^`indices` must have shape \(\.\.\., 2\), one index"):
        linear(residual()).decode(torch.zeros(3, 5, dtype=torch.int64))
