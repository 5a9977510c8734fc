"""Law 1: what decodes is what came out, in any layout of batch dimensions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tests.contracts.factories import (
    GivenStructure,
    decode,
    draw,
    every_quantizer,
    feature_axis,
    features_last,
    is_deterministic,
    quantizers_where,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


@every_quantizer
@pytest.mark.parametrize("cast", [False, True], ids=["module-float32", "module-cast"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_decode_returns_what_forward_returned(make, device, dtype, cast, masked):
    quantizer = make().to(device).eval()
    quantizer = quantizer.to(dtype) if cast else quantizer
    x = draw(quantizer, (8, 5), dtype=dtype, device=device)
    mask = torch.rand(8, 5).to(device) > 0.3 if masked else None
    out = quantizer(x, mask)
    exactly(decode(quantizer, out.indices, dtype), out.quantized)
    exactly(quantizer.encode(x, mask), out.indices)


@quantizers_where(is_deterministic)
def test_training_mode_returns_the_same(make):
    quantizer, reference = make(), make().eval()
    reference.load_state_dict(quantizer.state_dict())
    x = draw(quantizer)
    exactly(quantizer.train()(x).quantized, reference(x).quantized)


@every_quantizer
def test_result_has_the_declared_dtypes_and_shapes(make, device, dtype):
    quantizer = make().to(device)
    x = draw(quantizer, (2, 3), dtype=dtype, device=device)
    out = quantizer(x)
    assert (out.quantized.dtype, out.quantized.device) == (x.dtype, x.device)
    assert out.quantized.shape == x.shape
    per_token = (2, 3) if quantizer.num_codebooks == 1 else (2, 3, quantizer.num_codebooks)
    assert (out.indices.dtype, out.indices.shape) == (torch.int64, per_token)
    assert (out.loss.dtype, out.loss.shape) == (torch.float32, ())
    assert all((t.dtype, t.shape) == (torch.float32, ()) for t in out.terms.values())
    assert len(out.selections) == len(quantizer.codebooks)
    for selection, codebook in zip(out.selections, quantizer.codebooks, strict=True):
        assert selection.inputs.shape == selection.codes.shape == (2, 3, codebook.dim)
        assert selection.indices.shape == selection.mask.shape == (2, 3)


@every_quantizer
def test_loss_is_the_sum_of_the_terms(make):
    quantizer = make()
    out = quantizer(draw(quantizer))
    exactly(out.loss, sum(out.terms.values(), torch.zeros(())))


@every_quantizer
def test_results_are_float32_whatever_the_default_dtype(make):
    quantizer = make()
    x = draw(quantizer)
    torch.set_default_dtype(torch.float64)
    try:
        out = quantizer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.quantized.dtype == out.loss.dtype == torch.float32


@every_quantizer
def test_indices_name_codes_and_minus_one_names_nothing(make):
    quantizer = make().eval()
    indices = quantizer.encode(draw(quantizer, (1000,), scale=100.0))
    assert indices.min() >= 0
    assert indices.max() < quantizer.codebook_size
    nothing = quantizer.decode(torch.full_like(indices, -1))
    if isinstance(quantizer, GivenStructure):
        nothing = nothing - quantizer.structure(nothing.shape, nothing)
    exactly(nothing, torch.zeros_like(nothing))


@every_quantizer
def test_small_index_dtypes_decode_too(make):
    quantizer = make().eval()
    wide = quantizer.encode(draw(quantizer))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        if torch.iinfo(dtype).max < quantizer.codebook_size:
            continue
        exactly(quantizer.decode(wide.to(dtype)), quantizer.decode(wide))


@every_quantizer
@settings(max_examples=15)
@given(leading=st.lists(st.integers(0, 4), max_size=3).map(tuple), seed=st.integers(0, 2**16))
def test_leading_dimensions_are_batch_dimensions(make, leading, seed):
    quantizer = make().eval()
    if feature_axis(quantizer) == 1 and not leading:
        return
    x = draw(quantizer, leading, seed=seed)
    out, flat = quantizer(x), quantizer(features_last(quantizer, x).reshape(-1, quantizer.dim))
    quantized = features_last(quantizer, out.quantized)
    exactly(quantized, flat.quantized.reshape(*leading, quantizer.dim))
    exactly(out.indices, flat.indices.reshape(out.indices.shape))


@every_quantizer
def test_sizes_are_declared_consistently(make):
    quantizer = make()
    assert quantizer.bits_per_token >= 0
    assert 2**quantizer.bits_per_token == pytest.approx(math.prod(quantizer.codebook_sizes))
    assert quantizer.num_codebooks == len(quantizer.codebook_sizes)
    assert quantizer.codebook_size == max(quantizer.codebook_sizes)
    for codebook in quantizer.codebooks:
        assert codebook.codes().shape == (codebook.num_codes, codebook.dim)
        assert type(codebook).__name__ in repr(quantizer)
