"""Claims on precision: 16 and 17."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.claims.cast import (
    RULES,
    every_quantizer,
    every_rule,
    maps,
    quantizers_where,
    rules_can_write,
    seeded,
)
from tests.contracts.factories import state, vq
from vqprior import CodebookEMA, GroupedQuantizer, ResidualQuantizer, initialize_codebooks_
from vqprior.functional import IndexBackpropagation

every_low = pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


@quantizers_where(rules_can_write)
@every_rule
@every_low
def test_claim_16_statistics_stay_float32(make, rule, low):
    """vector-quantize-pytorch casts its statistics with the module: in half precision they stall
    or overflow. Here they stay float32, and what is learned in a module that was cast after the
    rule was built differs by the rounding of the codes alone."""
    quantizer = make().eval()
    learner = rule(quantizer)
    nn.ModuleList([quantizer, learner]).to(low)
    for seed in range(3):
        learner.step(quantizer(maps(quantizer, seed, dtype=low)))
    assert {buffer.dtype for buffer in learner.buffers()} <= {torch.float32, torch.int64}
    assert all(buffer.isfinite().all() for buffer in learner.buffers())
    assert {c.codes().dtype for c in quantizer.codebooks} == {low}


def test_claim_16_long_averages_do_not_drift_in_bfloat16():
    """vector-quantize-pytorch is off by 8.7 % after 300 steps of a moving average in bfloat16.
    Here the average is kept in float32, and codes are off by no more than their own rounding."""
    codebooks = []
    for dtype in (torch.float32, torch.bfloat16):
        quantizer = seeded(lambda: vq(k=4))
        rule = CodebookEMA(quantizer, decay=0.99)
        quantizer.to(dtype)
        quantizer.codebook.set_codes_(10.0 * torch.eye(4), torch.ones(4) > 0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            x = 12.0 * torch.eye(4).repeat(8, 1) + torch.randn(32, 4, generator=generator)
            rule.step(quantizer(x.bfloat16().to(dtype)))
        codebooks.append(quantizer.codebook.weight.float())
    error = (codebooks[1] - codebooks[0]).norm(dim=1) / codebooks[0].norm(dim=1)
    assert error.max() <= torch.finfo(torch.bfloat16).eps


def test_claim_16_counts_do_not_overflow_in_half_precision():
    """vector-quantize-pytorch counts in half precision, where 65504 is the end. Here many tokens
    of one code are counted, and the code is their mean."""
    quantizer = vq(k=2, d=2).half()
    rule = CodebookEMA(quantizer, decay=0.0).half()
    rule.step(quantizer(torch.full((70_000, 2), 2.0, dtype=torch.float16)))
    (chosen,) = quantizer(torch.full((1, 2), 2.0).half()).indices
    assert_close(
        quantizer.codebook.weight[chosen].float(), torch.full((2,), 2.0), rtol=0, atol=2e-3
    )
    assert all(buffer.isfinite().all() for buffer in rule.buffers())


@every_quantizer
@every_low
def test_claim_16_autocast_changes_nothing_on_any_device(make, low):
    """vector-quantize-pytorch switches autocast off on CUDA alone: on a CPU, indices flip. Here
    indices, codes and losses under autocast are those without it, and rules learn the same."""
    found = []
    for enabled in (False, True):
        quantizer = seeded(make).eval()
        rules = [rule(quantizer) for rule in RULES.values()] if rules_can_write(quantizer) else []
        with torch.autocast("cpu", dtype=low, enabled=enabled):
            out = quantizer(maps(quantizer))
            encoded = quantizer.encode(maps(quantizer))
            for rule in rules:
                rule.step(out)
        found.append((out.quantized, out.indices, out.terms, encoded, state(quantizer)))
    exactly(found[1], found[0])


@every_quantizer
@pytest.mark.parametrize("cast", [False, True], ids=["module-float32", "module-cast"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_claim_16_the_dtype_of_the_input_comes_out(make, dtype, cast):
    """vector-quantize-pytorch raises for half-precision tokens in front of a projection. Here
    every module takes every dtype and returns it."""
    quantizer = make().to(dtype) if cast else make()
    x = maps(quantizer, dtype=dtype)
    out = quantizer(x)
    assert out.quantized.dtype == dtype
    assert out.loss.dtype == torch.float32
    assert out.indices.dtype == torch.int64


def indices_of_float64(quantizer, selection, codebook):
    inputs = selection.inputs.detach().double().reshape(-1, codebook.dim)
    codes = codebook.codes().detach().double()
    return torch.cdist(inputs, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


SEARCHES = {
    "plain": lambda: vq(k=256, d=8),
    "grouped": lambda: GroupedQuantizer([vq(k=256, d=4), vq(k=256, d=4)]),
    "residual": lambda: ResidualQuantizer([vq(k=256, d=8), vq(k=256, d=8)]),
    "residual-shared": lambda: ResidualQuantizer([vq(k=256, d=8)] * 2),
}
OFFSETS = [(0.0, 1e-6), (0.0, 1e-5), (0.0, 1.0), (0.0, 1e6), (100.0, 1.0), (1000.0, 1.0)]


@pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES.keys())
@pytest.mark.parametrize(("offset", "scale"), OFFSETS)
def test_claim_17_the_nearest_code_is_found_at_any_offset_and_scale(make, offset, scale):
    """vector-quantize-pytorch finds the wrong code for 79 % of tokens around 1000, and one code
    for all at a scale of 1e-5. Here at most one token in a thousand, those between two codes,
    differs from a search in float64."""
    quantizer = make().eval()
    x = offset + scale * torch.randn(4000, quantizer.dim)
    initialize_codebooks_(quantizer, x, method="sample")
    for selection, codebook in zip(quantizer(x).selections, quantizer.codebooks, strict=True):
        wrong = selection.indices.flatten() != indices_of_float64(quantizer, selection, codebook)
        assert wrong.double().mean() <= 1e-3


def test_claim_17_the_search_is_not_decided_by_the_gradient_estimator():
    """vector-quantize-pytorch clamps distances before it compares them. Here an estimator that
    needs all distances chooses as the search does, at a scale of 1e-5 too."""
    plain, estimated = (
        seeded(lambda e=e: vq(k=64, **e)).eval()
        for e in ({}, {"estimator": IndexBackpropagation()})
    )
    x = 1e-5 * maps(plain)
    for quantizer in (plain, estimated):
        initialize_codebooks_(
            quantizer, x, method="sample", generator=torch.Generator().manual_seed(0)
        )
    exactly(estimated(x).indices, plain(x).indices)
    assert plain(x).indices.unique().numel() == 48
