"""Law 1: ``decode`` of the indices equals ``quantized``, for any batch dimensions."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contracts.factories import every_quantizer, quantizers_where
from tests.contracts.layouts import (
    GivenStructure,
    decode,
    draw,
    draw_mask,
    exactly,
    feature_axis,
    features_last,
    has,
    is_of_tokens,
    map_size,
)
from tests.contracts.traits import is_deterministic, is_pure, ranks_codes
from tests.speeds import full
from vqprior import FSQ, MultiScaleQuantizer, QuantizerOutput


def positions(quantizer):
    """The dimension that all scales add to the shape of the indices; [] without scales."""
    scales = [m.scales for m in quantizer.modules() if isinstance(m, MultiScaleQuantizer)]
    return [sum(math.prod(scale) for scale in scales[0])] if scales else []


@every_quantizer
@pytest.mark.parametrize("cast", [False, *full(True)], ids=["module-float32", "module-cast"])
def test_decode_returns_what_forward_returned(make, device, dtype, cast):
    quantizer = make().to(device)
    quantizer = quantizer.to(dtype) if cast else quantizer
    x = draw(quantizer, (8, 5), dtype=dtype, device=device)
    features_last(quantizer, x)[0, 0] = 0.0  # has no direction
    for mask in (None, draw_mask(quantizer, (8, 5)).to(device)):
        out = quantizer.eval()(x, mask)
        exactly(decode(quantizer, out.indices, dtype), out.quantized)
        exactly(quantizer.encode(x, mask), out.indices)
        exactly(quantizer.quantize_as(x, out.indices).quantized, out.quantized)
        if is_pure(quantizer.train()):  # otherwise codes have moved since
            out = quantizer(x, mask)
            exactly(decode(quantizer, out.indices, dtype), out.quantized)


@every_quantizer
@pytest.mark.parametrize("own", [torch.bfloat16, *full(torch.float16, torch.float64)], ids=str)
def test_decode_returns_the_dtype_of_the_module(make, own):
    """So the next layer takes it; ``forward`` returns these codes in the dtype of the input."""
    quantizer = make().to(own).eval()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = draw(quantizer, (8, 5), dtype=dtype)
        out = quantizer(x)
        exactly(decode(quantizer, out.indices, dtype), out.quantized)
        if isinstance(quantizer, GivenStructure):
            continue  # which has the dtype of the structure
        decoded = quantizer.decode(out.indices)
        assert decoded.dtype == quantizer.dtype == own
        with torch.autocast("cpu", dtype=torch.bfloat16 if own is torch.float64 else own):
            exactly(quantizer.decode(out.indices), decoded)


def test_without_parameters_the_dtype_is_the_one_at_construction_or_of_the_last_cast():
    torch.set_default_dtype(torch.float64)
    try:
        fsq = FSQ([3, 3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert fsq.decode(torch.tensor(0)).dtype == torch.float64
    model = torch.nn.Sequential(fsq)
    assert model.half()[0].decode(torch.tensor(0)).dtype == torch.float16
    assert copy.deepcopy(model)[0].dtype == torch.float16
    assert model.to("meta").to(torch.bfloat16)[0].dtype == torch.bfloat16


@quantizers_where(is_deterministic, lambda q: is_of_tokens(q) or is_pure(q))
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
    assert type(out) is QuantizerOutput
    assert (out.quantized.dtype, out.quantized.device) == (x.dtype, x.device)
    assert out.quantized.shape == x.shape
    last = () if quantizer.num_codebooks == 1 else (quantizer.num_codebooks,)
    assert (out.indices.dtype, out.indices.shape) == (
        torch.int64,
        (2, 3, *positions(quantizer), *last),
    )
    assert (out.loss.dtype, out.loss.shape) == (torch.float32, ())
    assert all((t.dtype, t.shape) == (torch.float32, ()) for t in out.terms.values())
    exactly(out.loss, sum(out.terms.values(), torch.zeros((), device=device)))
    assert len(out.selections) == len(quantizer.codebooks)
    for selection, codebook in zip(out.selections, quantizer.codebooks, strict=True):
        assert selection.inputs.shape == selection.codes.shape
        assert selection.inputs.shape[-1] == codebook.dim
        assert selection.indices.shape == selection.mask.shape == selection.inputs.shape[:-1]
        assert map_size(quantizer) or selection.indices.shape == (2, 3)


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


@pytest.mark.filterwarnings("ignore:.*looks like feature maps")  # 4 x 4 tokens of 4 features
@every_quantizer
@settings(max_examples=15)
@given(leading=st.lists(st.integers(0, 4), max_size=3).map(tuple), seed=st.integers(0, 2**16))
def test_leading_dimensions_are_batch_dimensions(make, leading, seed):
    quantizer = make().eval()
    if feature_axis(quantizer) == 1 and not leading:
        return
    x = draw(quantizer, leading, seed=seed)
    last = features_last(quantizer, x)
    if has(quantizer, MultiScaleQuantizer) and feature_axis(quantizer) == 1:
        flat = last.flatten(0, len(leading) - 1).movedim(-1, 1)
    else:
        flat = last.reshape(-1, *map_size(quantizer), quantizer.dim)
    out, expected = quantizer(x), quantizer(flat)
    quantized = features_last(quantizer, out.quantized)
    exactly(quantized, features_last(quantizer, expected.quantized).reshape(last.shape))
    exactly(out.indices, expected.indices.reshape(out.indices.shape))


@every_quantizer
def test_sizes_are_declared_consistently(make):
    quantizer = make()
    bits = math.log2(math.prod(quantizer.codebook_sizes))
    share = math.prod(positions(quantizer)) / math.prod(map_size(quantizer))
    assert quantizer.bits_per_token == pytest.approx(share * bits)
    assert quantizer.num_codebooks == len(quantizer.codebook_sizes)
    assert quantizer.codebook_size == max(quantizer.codebook_sizes)
    for codebook in quantizer.codebooks:
        assert codebook.codes().shape == (codebook.num_codes, codebook.dim)
        assert type(codebook).__name__ in repr(quantizer)
    assert type(quantizer).__name__ in repr(quantizer)


@quantizers_where(ranks_codes)
def test_logits_score_every_index(make):
    """Without ``indices``, logits follow the greedy choice of each stage, unlike a beam search."""
    quantizer = make().eval()
    x = draw(quantizer)
    indices = quantizer.encode(x)
    forced = quantizer.logits(x, indices=indices)
    assert forced.shape == (*indices.shape, quantizer.codebook_size)
    if all(getattr(module, "beam_size", 1) == 1 for module in quantizer.modules()):
        exactly(forced, quantizer.logits(x))
        exactly(forced.argmax(dim=-1), indices)
