"""Law 5: search in float32 or wider; indices are those of the float64 arg-min; ties go low."""

import itertools

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.contracts.factories import (
    every_quantizer,
    every_quantizer_of_one_codebook,
    every_quantizer_of_one_table,
    quantizers_where,
)
from tests.contracts.layouts import draw, exactly, features_last
from tests.contracts.traits import learned_by_rules
from vqprior import VectorQuantizer, initialize_codebooks_

OFFSETS_AND_SCALES = [(0.0, 1e-6), (0.0, 1.0), (0.0, 1e6), (1000.0, 1.0), (-1000.0, 0.1)]
LOW = (torch.float16, torch.bfloat16)


def searches_one_by_one(quantizer):
    """Whether each codebook is searched alone (no beam), for the input itself (no projection).

    A projection to a few features changes the offset of the input.
    """
    widths = [getattr(module, "beam_size", 1) for module in quantizer.modules()]
    metrics = {m.metric for m in quantizer.modules() if isinstance(m, VectorQuantizer)}
    return max(widths) == 1 and len(metrics) == 1


def check_against_float64(quantizer, x):
    """The chosen code scores, in float64, like the best one up to float32 rounding."""
    (metric,) = {m.metric for m in quantizer.modules() if isinstance(m, VectorQuantizer)}
    out = quantizer(x)
    for selection, codebook in zip(out.selections, quantizer.codebooks, strict=True):
        inputs = selection.inputs.detach().double().reshape(-1, codebook.dim)
        codes = codebook.codes().detach().double()
        if metric == "euclidean":
            scores = torch.cdist(inputs, codes, compute_mode="donot_use_mm_for_euclid_dist") ** 2
            spread = (inputs - codes.mean(dim=0)).norm(dim=1) + (codes - codes.mean(dim=0)).norm()
            scale = spread**2
        elif metric == "cosine":
            scores = -F.normalize(inputs, dim=1) @ F.normalize(codes, dim=1).T
            scale = torch.ones(len(inputs))
        else:
            scores = -inputs @ codes.T
            scale = inputs.norm(dim=1) * codes.norm(dim=1).max()
        chosen = scores.gather(1, selection.indices.reshape(-1, 1)).squeeze(1)
        # A product of length 4 and a sum of two terms, if every rounding has the same sign.
        assert (chosen - scores.amin(dim=1) <= 8 * torch.finfo(torch.float32).eps * scale).all()


def with_codes_near(quantizer, x):
    initialize_codebooks_(quantizer, x.float(), method="sample")
    return quantizer


@quantizers_where(learned_by_rules, searches_one_by_one)
def test_indices_are_those_of_the_float64_minimum(make):
    for offset, scale in OFFSETS_AND_SCALES:
        quantizer = make().eval()
        x = offset + draw(quantizer, (200,), scale=scale)
        check_against_float64(with_codes_near(quantizer, x), x)


@every_quantizer_of_one_table
def test_half_precision_modules_and_inputs_are_searched_in_float32(make):
    for offset, low in itertools.product((0.0, 1000.0), LOW):
        quantizer = make().eval().to(low)
        x = (offset + draw(quantizer, (200,), scale=8.0)).to(low)
        check_against_float64(with_codes_near(quantizer, x), x)
        assert quantizer(x).loss.dtype == torch.float32


@every_quantizer
def test_autocast_changes_no_index_and_no_loss(make):
    quantizer = make().eval()
    x = draw(quantizer, (200,))
    expected = quantizer(x)
    for low in LOW:
        with torch.autocast("cpu", dtype=low):
            out = quantizer(x)
            encoded = quantizer.encode(x)
            decoded = quantizer.decode(expected.indices)
        exactly(out.indices, expected.indices)
        exactly(encoded, expected.indices)
        exactly(out.terms, expected.terms)
        exactly(out.quantized, expected.quantized)
        exactly(decoded, expected.quantized)


@every_quantizer_of_one_codebook
def test_the_loss_does_not_overflow_in_half_precision(make):
    quantizer = make().eval().half()
    x = draw(quantizer, (200,), scale=1000.0).half()
    out = quantizer(x)
    assert out.loss.isfinite()
    (selection,) = out.selections
    exact = (selection.inputs.double() - selection.codes.double()).square().mean()
    if "commitment" in out.terms:
        assert_close(out.terms["commitment"].double(), 0.25 * exact, rtol=1e-5, atol=0.0)


@every_quantizer_of_one_table
def test_ties_go_to_the_lowest_index(make):
    quantizer = make().eval()
    (codebook,) = quantizer.codebooks
    pairs = torch.arange(codebook.num_codes) // 2  # codes 2i and 2i + 1 are the same
    vectors = F.one_hot(pairs % codebook.dim, codebook.dim) * (1 + pairs[:, None])
    codebook.set_codes_(vectors.float(), torch.ones(codebook.num_codes) > 0)
    indices = quantizer.encode(draw(quantizer, (500,), scale=8.0))
    assert (indices % 2 == 0).all()


@every_quantizer_of_one_table
def test_double_precision_is_kept(make):
    quantizer = make().eval().double()
    (codebook,) = quantizer.codebooks
    x = draw(quantizer, (3,), dtype=torch.float64)
    inputs = quantizer(x).selections[0].inputs
    near = inputs[0].expand(codebook.num_codes, -1).clone()
    near[-1] *= 1 + 1e-12  # indistinguishable in float32
    codebook.set_codes_(near, torch.ones(codebook.num_codes) > 0)
    scaled = quantizer(x).selections[0]
    assert scaled.codes.dtype == torch.float64
    assert features_last(quantizer, quantizer(x).quantized).dtype == torch.float64
    check_against_float64(quantizer, x)
