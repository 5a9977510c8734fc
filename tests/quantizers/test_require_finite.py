"""`RequireFinite`: it raises where quantizers would skip, and changes nothing else."""

import re

import pytest
import torch
from torch.testing import assert_close

from vqprior import (
    ChannelsFirst,
    CodebookEMA,
    MultiScaleQuantizer,
    RequireFinite,
    ResidualQuantizer,
    SelfUpdating,
    VectorQuantizer,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["forward", "encode"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_raises_and_says_how_many(call, value):
    x = torch.randn(2, 5, 4)
    x[0, 1, 2] = x[1, 4] = value
    message = (
        "`x` must be finite, got a NaN or an infinity in 2 of 10 tokens. Mask them, or remove "
        "`RequireFinite`: quantizers mask such tokens."
    )
    quantizer = RequireFinite(VectorQuantizer(4, 16))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(quantizer, call)(x)


def test_masked_tokens_may_hold_anything():
    inner, x = VectorQuantizer(4, 16), torch.randn(6, 4)
    mask = torch.tensor([True, True, False, True, False, True])
    x[~mask] = torch.nan
    quantizer = RequireFinite(inner)
    exactly(quantizer(x, mask).indices, inner(x, mask).indices)
    exactly(quantizer.encode(x, mask), inner.encode(x, mask))
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"in 1 of 6 tokens"):
        quantizer(x, mask)


def test_the_largest_number_is_finite():
    limits = torch.finfo(torch.float32)
    x = torch.tensor([[limits.max, limits.min, limits.tiny, 0.0]])
    assert RequireFinite(VectorQuantizer(4, 16))(x).indices.shape == (1,)
    assert RequireFinite(VectorQuantizer(4, 16))(x[:0]).indices.shape == (0,)


def test_everything_else_is_that_of_the_quantizer():
    inner, x = VectorQuantizer(4, 16), torch.randn(6, 4)
    quantizer = RequireFinite(inner)
    exactly(quantizer(x).quantized, inner(x).quantized)
    exactly(quantizer(x).terms, inner(x).terms)
    indices = quantizer.encode(x)
    exactly(quantizer.decode(indices), inner.decode(indices))
    exactly(quantizer.quantize_as(x, indices).terms, inner.quantize_as(x, indices).terms)
    exactly(quantizer.logits(x, temperature=2.0), inner.logits(x, temperature=2.0))
    exactly(quantizer.nearest_indices(x, 3), inner.nearest_indices(x, 3))
    assert (quantizer.dim, quantizer.codebook_sizes, quantizer.bits_per_token) == (4, (16,), 4.0)
    residual = ResidualQuantizer([VectorQuantizer(4, 16) for _ in range(2)])
    given = torch.randint(16, (6, 2))
    exactly(RequireFinite(residual).logits(x, indices=given), residual.logits(x, indices=given))


def test_only_forward_and_encode_check():
    quantizer, x = RequireFinite(VectorQuantizer(4, 16)), torch.full((2, 4), torch.nan)
    assert quantizer.quantize_as(x, torch.zeros(2, dtype=torch.int64)).indices.tolist() == [-1, -1]


def test_it_works_inside_and_outside_of_other_wrappers():
    x = torch.randn(2, 4, 3, 3)
    broken = x.clone()
    broken[1, 2, 0, 0] = torch.nan
    inner = VectorQuantizer(4, 16)
    quantizer = ChannelsFirst(SelfUpdating(RequireFinite(inner), CodebookEMA(inner)))
    assert quantizer(x).indices.shape == (2, 3, 3)
    with pytest.raises(ValueError, match=r"in 1 of 18 tokens"):
        quantizer(broken)
    scales = RequireFinite(MultiScaleQuantizer(inner, (1, 3)))
    assert not scales.has_index_per_token
    assert scales(x.movedim(1, -1)).indices.shape == (2, 10)
    with pytest.raises(ValueError, match=r"in 1 of 18 tokens"):
        scales(broken.movedim(1, -1))


def test_wrong_input_is_named_before_it_is_searched():
    quantizer = RequireFinite(VectorQuantizer(4, 16))
    with pytest.raises(TypeError, match=r"^`x` must be a floating-point tensor, got torch\.int64"):
        quantizer(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^`x` must have shape \(\.\.\., 4\), got \(2, 5\)\."):
        quantizer(torch.full((2, 5), torch.nan))
    with pytest.raises(ValueError, match=r"^`mask` must have shape \(2,\), got \(3,\)\.$"):
        quantizer(torch.zeros(2, 4), torch.ones(3) > 0)


@pytest.mark.parametrize("call", ["forward", "encode"])
def test_broken_codes_are_named(call):
    inner = VectorQuantizer(4, 16)
    inner.codebook.weight.data[3, :2] = torch.tensor([torch.nan, torch.inf])
    message = (
        "`quantizer` must hold finite numbers, got a NaN or an infinity in 2 of 64 numbers of "
        "`codebook.weight`. Quantizers never choose such a code, and `CodebookRevival` replaces it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(RequireFinite(inner), call)(torch.randn(5, 4))
