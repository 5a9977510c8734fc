"""Claims on how codebooks start and learn: 2, 10, 11, 21, 24."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.claims.cast import (
    every_rule,
    filled,
    maps,
    normalized,
    quantizers_where,
    residual,
    rules_can_write,
    seeded,
    skips_what_is_not_finite,
    some_tokens,
)
from tests.contracts.factories import DIM, arrange, features_last, state, vq
from vqprior import (
    CodebookEMA,
    CodebookRevival,
    RequireFinite,
    ResidualQuantizer,
    initialize_codebooks_,
)
from vqprior.metrics import CodebookUsage

BROKEN = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
every_breakage = pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN.keys())


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def broken_in_one_feature(quantizer, x, mask, value):
    last = features_last(quantizer, x).clone()
    last[~mask, 0] = value
    return arrange(quantizer, last)


@quantizers_where(rules_can_write, skips_what_is_not_finite)
@every_rule
@every_breakage
def test_claim_02_a_broken_token_teaches_nothing(make, rule, value):
    """vector-quantize-pytorch turns every code into NaN, for ever, at the first NaN or infinity,
    even in padding. Here such a token is left out: codebooks and rules are, bit for bit, those of
    a run in which it was masked, and the meter counts it."""
    found, mask = [], some_tokens()
    for broken in (False, True):
        quantizer, meter = seeded(make).eval(), CodebookUsage(make().codebook_size)
        learner = rule(quantizer)
        for seed in range(3):
            x = maps(quantizer, seed)
            given = None if broken else mask
            x = broken_in_one_feature(quantizer, x, mask, value) if broken else x
            out = quantizer(x, given)
            learner.step(out)
            meter.update(out.indices)
        found.append((state(quantizer), state(learner), meter.compute()))
    exactly(found[1][:2], found[0][:2])
    assert found[1][2] == found[0][2]
    assert all(value.isfinite().all() for value in found[1][0].values())


@quantizers_where(rules_can_write, skips_what_is_not_finite)
def test_claim_02_broken_padding_teaches_nothing(make):
    """vector-quantize-pytorch lets a NaN in masked padding into its codebook. Here what padding
    holds does not matter, NaN included."""
    found, mask = [], some_tokens()
    for value in (0.0, torch.nan):
        quantizer = seeded(make).eval()
        rules = [CodebookEMA(quantizer), CodebookRevival(quantizer, patience=1.0)]
        out = quantizer(filled(quantizer, maps(quantizer), mask, value), mask)
        for rule in rules:
            rule.step(out)
        found.append([state(module) for module in (quantizer, *rules)])
    exactly(found[1], found[0])


@every_breakage
@pytest.mark.parametrize("method", ["kmeans", "sample"])
def test_claim_02_broken_tokens_start_no_codebook(value, method):
    """vector-quantize-pytorch starts from NaN where the first batch has one. Here such a token
    takes no part in the start."""
    found, mask = [], some_tokens()
    for broken in (False, True):
        quantizer = residual()
        x = maps(quantizer)
        inputs = (broken_in_one_feature(quantizer, x, mask, value),) if broken else (x, mask)
        initialize_codebooks_(
            quantizer, *inputs, method=method, generator=torch.Generator().manual_seed(1)
        )
        found.append(state(quantizer))
    exactly(found[1], found[0])


def test_claim_02_a_broken_token_raises_where_one_asks_for_it():
    """vector-quantize-pytorch says nothing about a NaN. Here a wrapper raises at it, and counts."""
    quantizer = RequireFinite(residual())
    x, mask = maps(quantizer), some_tokens()
    x[0, 0, 0, 1] = torch.nan
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match=r"^`x` must be finite, got .* in 1 of 48 tokens\."):
            call(x)
    x[~mask] = torch.inf
    x[0, 0, 0] = 0.0
    assert quantizer(x, mask).loss.isfinite()


CASES = {
    "more-tokens-than-codes": (64, 200, 200),
    "more-codes-than-tokens": (512, 64, 64),
    "few-distinct-tokens": (256, 2048, 20),
}


@pytest.mark.parametrize(("codes", "tokens", "distinct"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("method", ["kmeans", "sample"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_claim_10_no_start_leaves_zero_codes(codes, tokens, distinct, method, metric):
    """vector-quantize-pytorch starts 448 of 512 codes at zero where a batch has 64 tokens. Here
    every code is a token or a mean of tokens; codes repeat only where distinct tokens are fewer,
    and then every token is a code."""
    quantizer = vq(k=codes, metric=metric)
    points = 5 + torch.randn(distinct, DIM)
    x = points[torch.arange(tokens) % distinct]
    initialize_codebooks_(quantizer, x, method=method)
    vectors = quantizer.codebook.codes().detach()
    assert (vectors.norm(dim=1) > 1).all()
    if method == "kmeans":
        assert len(vectors.unique(dim=0)) >= min(codes, distinct)
    if codes >= distinct and method == "kmeans":
        # Means of equal vectors, summed up in float32.
        assert_close(quantizer(x).quantized.detach(), x, rtol=1e-5, atol=1e-5)


def test_claim_10_only_an_explicit_start_starts():
    """vector-quantize-pytorch spends its start on the first forward of any mode, be it a dummy of
    one token. Here a forward starts nothing: codes are usable from the beginning, and
    `initialize_codebooks_` is called, in either mode, when there is data."""
    for quantizer in (vq(), residual(), normalized()):
        before = state(quantizer)
        for training in (True, False):
            quantizer.train(training)(torch.zeros(1, DIM))
            exactly(state(quantizer), before)
        x = 10 + torch.randn(400, DIM)
        error = (quantizer(x).quantized - x).square().mean()
        initialize_codebooks_(quantizer.eval(), x)
        assert (quantizer(x).quantized - x).square().mean() < error


def test_claim_10_stages_start_from_what_earlier_stages_left():
    """vector-quantize-pytorch starts at the first forward; so does each of its stages. Here one
    call starts all stages, each from residuals: every further one lowers the error."""
    quantizer, x = residual().eval(), torch.randn(400, DIM)
    initialize_codebooks_(quantizer, x)
    indices, errors = quantizer.encode(x), [x.square().mean()]
    for count in range(1, 4):
        coarse = indices.clone()
        coarse[..., count:] = -1
        errors.append((quantizer.decode(coarse) - x).square().mean())
    assert all(2 * after < before for before, after in itertools.pairwise(errors))


def churn(tokens, codes, windows):
    """How many codes a revival moves in each window of ``patience`` tokens a code."""
    patience, moved = 10, []
    quantizer = vq(k=codes)
    ema = CodebookEMA(quantizer, decay=0.9)
    revival = CodebookRevival(quantizer, patience=patience)
    for _ in range(windows):
        total = 0
        for _ in range(patience * codes // tokens):
            out = quantizer(torch.randn(tokens, DIM))
            ema.step(out)
            before = quantizer.codebook.weight.detach().clone()
            revival.step(out)
            total += int((quantizer.codebook.weight != before).any(dim=1).sum())
        moved.append(total)
    return moved


@pytest.mark.parametrize(("tokens", "codes"), [(128, 256), (512, 64), (32, 128)])
def test_claim_11_revival_comes_to_rest_whatever_the_batch_size(tokens, codes):
    """vector-quantize-pytorch counts against an absolute threshold: with fewer tokens than codes
    it replaces half of the codebook in every step, for ever. Here the threshold is relative to
    the mean use over a window: on stationary data hardly one code in fifty moves in a whole
    window, after the first few."""
    assert sum(churn(tokens, codes, windows=8)[4:]) / 4 <= codes / 50


def test_claim_11_revival_ends_on_data_with_fewer_tokens_than_codes():
    """vector-quantize-pytorch never ends to replace codes there. Here a token that is a code
    already revives none."""
    quantizer, points = vq(k=64), torch.randn(10, DIM)
    ema, revival = CodebookEMA(quantizer, decay=0.5), CodebookRevival(quantizer, patience=2.0)
    moved = []
    for _ in range(80):
        out = quantizer(points)
        ema.step(out)
        before = quantizer.codebook.weight.detach().clone()
        revival.step(out)
        moved.append(bool((quantizer.codebook.weight != before).any()))
    assert any(moved)
    assert not any(moved[40:])
    assert_close(quantizer(points).quantized.detach(), points, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("make", [vq, normalized, residual], ids=["plain", "unit", "residual"])
def test_claim_11_codes_that_nothing_chose_stay(make):
    """vector-quantize-pytorch drags them to the origin; on the sphere they become zero vectors.
    Here they do not move by a bit."""
    quantizer = make()
    rule = CodebookEMA(quantizer, decay=0.8)
    starts = [codebook.codes().detach().clone() for codebook in quantizer.codebooks]
    chosen = [torch.zeros(16) > 0 for _ in starts]
    x = torch.tensor([5.0, 0.0, 0.0, 0.0]) + 0.1 * torch.randn(20, DIM)
    for _ in range(100):
        out = quantizer(x)
        for hits, selection in zip(chosen, out.selections, strict=True):
            hits[selection.indices] = True
        rule.step(out)
    for hits, start, codebook in zip(chosen, starts, quantizer.codebooks, strict=True):
        assert 0 < hits.sum() < 16
        exactly(codebook.codes().detach()[~hits], start[~hits])
        assert (codebook.codes()[hits] != start[hits]).any()


def test_claim_11_revival_draws_from_its_own_seed():
    """vector-quantize-pytorch draws replacements from the global generator. Here the choice
    depends on `seed` and the number of steps, and the global generator stays where it was."""
    found = []
    for seed, of_torch in ((0, 1), (0, 2), (1, 1)):
        quantizer = seeded(vq)
        revival = CodebookRevival(quantizer, patience=1.0, seed=seed)
        out = quantizer(10 * maps(quantizer))
        torch.manual_seed(of_torch)
        before = torch.get_rng_state()
        revival.step(out)
        exactly(torch.get_rng_state(), before)
        found.append(state(quantizer)["codebook.weight"])
    exactly(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@quantizers_where(rules_can_write)
def test_claim_11_revival_takes_tokens_that_count(make):
    """vector-quantize-pytorch with a shared codebook revives codes from padding. Here masked
    tokens are never taken."""
    quantizer = make().eval()
    revival = CodebookRevival(quantizer, patience=0.1, threshold=1.0)
    mask = some_tokens()
    revival.step(quantizer(filled(quantizer, maps(quantizer), mask, 1e6), mask))
    for codebook in quantizer.codebooks:
        assert codebook.codes().norm(dim=1).max() < 1e3


@quantizers_where(rules_can_write)
def test_claim_21_codes_that_were_set_stay_set(make):
    """vector-quantize-pytorch undoes codes that a user sets at its next moving average, which
    knows nothing of them. Here a rule takes up what was set: it goes on as a fresh rule would."""
    old, fresh = seeded(make).eval(), seeded(make).eval()
    rule = CodebookEMA(old, decay=0.9)
    for seed in range(3):
        rule.step(old(maps(old, seed)))
    fresh_rule = None
    for quantizer in (old, fresh):
        torch.manual_seed(8)
        for codebook in {id(c): c for c in quantizer.codebooks}.values():
            codebook.set_codes_(torch.randn(codebook.num_codes, codebook.dim), torch.ones(16) > 0)
    fresh_rule = CodebookEMA(fresh, decay=0.9)
    for seed in range(3, 6):
        rule.step(old(maps(old, seed)))
        fresh_rule.step(fresh(maps(fresh, seed)))
        exactly([c.codes() for c in old.codebooks], [c.codes() for c in fresh.codebooks])


def test_claim_21_a_batch_of_the_codes_keeps_the_codes():
    """vector-quantize-pytorch moves codes that were set even where the data are those codes. Here
    they stay, to rounding."""
    quantizer = vq()
    rule = CodebookEMA(quantizer, decay=0.9)
    for seed in range(3):
        rule.step(quantizer(maps(quantizer, seed)))
    codes = torch.randn(16, DIM)
    quantizer.codebook.set_codes_(codes, torch.ones(16) > 0)
    for _ in range(50):
        rule.step(quantizer(codes))
    # Each step divides a mass by a count: a few roundings of 2**-24, which decay.
    assert_close(quantizer.codebook.weight.detach(), codes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stages", [2, 8])
def test_claim_24_a_shared_codebook_takes_one_step_for_all_its_uses(stages):
    """vector-quantize-pytorch decays the counts of a codebook that is shared by Q stages Q times
    in a step. Here they decay once, and count the choices of all stages."""
    quantizer = ResidualQuantizer([vq()] * stages)
    rule = CodebookEMA(quantizer, decay=0.75)
    out = quantizer(maps(quantizer))
    hits = out.indices.flatten().bincount(minlength=16)
    assert hits.sum() == 48 * stages
    rule.step(out)
    (counts,) = (buffer for name, buffer in rule.named_buffers() if name.startswith("counts"))
    exactly(counts, 0.75 + 0.25 * hits)
    assert len(quantizer.state_dict()) == 1
