"""`ResidualQuantizer`: a hand-written loop, one outer gradient, logits, prefixes."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import state
from tests.quantizers.stages import exactly, plain
from vqprior import (
    FSQ,
    LFQ,
    CodebookEMA,
    GroupedQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)
from vqprior.functional import rotation_trick


def loop(quantizers, x):
    """Each stage on what is left, with nothing but the stages: results and the sum of codes."""
    total, outs = torch.zeros_like(x), []
    for quantizer in quantizers:
        outs.append(quantizer(x - total))
        total = total + outs[-1].quantized.detach()
    return outs, total


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equals_a_hand_written_loop(count):
    residual = plain(count)
    x = torch.randn(3, 7, 4)
    outs, total = loop(residual.stages, x)
    out = residual(x)
    exactly(out.quantized, total)
    indices = torch.stack([each.indices for each in outs], dim=-1)
    exactly(out.indices, indices.squeeze(-1) if count == 1 else indices)
    assert sorted(out.terms) == ["codebook", "commitment", "unused"]
    for name, term in out.terms.items():
        assert_close(term, sum(each.terms[name] for each in outs) / count)
    for ours, each in zip(out.selections, outs, strict=True):
        exactly(vars(ours), vars(each.selections[0]))


def test_the_commitment_gradients_are_those_of_the_loop_and_none_vanishes():
    residual, x = plain(4), torch.randn(30, 4, requires_grad=True)
    losses = [out.terms["commitment"] for out in loop(residual.stages, x)[0]]
    expected = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    parts = [s.inputs - s.codes.detach() for s in residual(x).selections]
    losses = [0.25 * part.square().mean() for part in parts]
    actual = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    assert_close(actual, expected)
    assert all((gradient != 0).all() for gradient in actual)
    (whole,) = torch.autograd.grad(residual(x).terms["commitment"], x)
    assert_close(whole, sum(expected) / 4)


def test_the_commitment_of_a_stage_is_the_error_of_the_sum_so_far():
    """The detached remainder makes the two ways of writing the loss the same."""
    residual, x = plain(4), torch.randn(30, 4)
    out = residual(x)
    codes = [stage.decode(part) for stage, part in zip(residual.stages, out.indices.T, strict=True)]
    sums = torch.stack(codes).cumsum(dim=0)
    expected = 0.25 * (x - sums).square().mean()
    assert_close(out.terms["commitment"], expected)


@pytest.mark.parametrize("count", [1, 8])
def test_the_gradient_of_quantized_is_the_identity(count):
    """Exactly, whatever the number of stages: not that number times the identity."""
    x = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    exactly(torch.autograd.grad((weight * plain(count)(x).quantized).sum(), x)[0], weight)


def test_another_estimator_sees_the_input_and_the_sum():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    residual = plain(3, estimator=rotation_trick)
    out = residual(x)
    (expected,) = torch.autograd.grad((weight * rotation_trick(x, out.quantized)).sum(), x)
    assert_close(torch.autograd.grad((weight * out.quantized).sum(), x)[0], expected)


def test_modules_of_a_stage_learn_from_the_result():
    """As if the sum had been written out with the lowered remainders as constants."""
    first = ProjectedQuantizer(VectorQuantizer(2, 16), nn.Linear(4, 2), nn.Linear(2, 4))
    second = ProjectedQuantizer(VectorQuantizer(3, 16), nn.Linear(4, 3), nn.Linear(3, 4))
    residual = ResidualQuantizer([first, second])
    x, weight = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    parameters = [
        p for stage in (first, second) for p in (*stage.down.parameters(), *stage.up.parameters())
    ]
    out = residual(x)
    actual = torch.autograd.grad((weight * out.quantized).sum(), [x, *parameters])

    expected = [weight]  # of x: the outer estimator and nothing else
    rest = x.detach()
    for stage, indices in zip((first, second), out.indices.T, strict=True):
        codes = stage.quantizer.codebook.codes().detach()[indices]
        lowered = rest @ stage.down.weight.detach().T + stage.down.bias.detach()
        assert_close(
            torch.cdist(lowered, stage.quantizer.codebook.codes().detach()).argmin(1), indices
        )
        inner = weight @ stage.up.weight.detach()  # what reaches the codes, and straight through
        expected += [inner.T @ rest, inner.sum(dim=0), weight.T @ codes, weight.sum(dim=0)]
        rest = rest - (codes @ stage.up.weight.detach().T + stage.up.bias.detach())
    assert_close(actual, tuple(expected))


def test_a_frozen_stage_adds_no_gradient_of_its_own():
    frozen = plain(3).requires_grad_(requires_grad=False)
    x = torch.randn(5, 4, requires_grad=True)
    out = frozen(x)
    assert sorted(out.terms) == ["commitment"]
    exactly(torch.autograd.grad(out.quantized.sum(), x)[0], torch.ones(5, 4))
    with torch.no_grad():
        assert not frozen(x).quantized.requires_grad


def test_masked_tokens_have_no_index_in_any_stage():
    residual = plain(3)
    x, mask = torch.randn(20, 4), torch.rand(20) > 0.4
    x[3, 1] = torch.nan
    out, valid = residual(x, mask), mask & (torch.arange(20) != 3)
    exactly(out.indices >= 0, valid[:, None].expand(20, 3))
    alone = residual(x[valid])
    exactly(out.quantized[valid], alone.quantized)
    assert not out.quantized[~valid].any()
    assert_close(out.terms, alone.terms)


def test_a_shared_codebook_is_stored_once_and_takes_one_step_for_all_uses():
    shared = VectorQuantizer(4, 16)
    residual = ResidualQuantizer([shared] * 3)
    assert list(residual.state_dict()) == ["stages.unique.0.codebook.weight"]
    assert residual.codebooks == (shared.codebook,) * 3
    twin = VectorQuantizer(4, 16)
    twin.load_state_dict(shared.state_dict())
    x = torch.randn(50, 4)
    out, ema, reference = residual(x), CodebookEMA(residual), CodebookEMA(twin)
    inputs = torch.cat([s.inputs for s in out.selections])
    together = twin(inputs)
    exactly(together.indices, out.indices.T.reshape(-1))
    ema.step(out)
    reference.step(together)
    assert_close(shared.codebook.weight, twin.codebook.weight)
    assert_close(ema.counts_0, reference.counts_0)


def test_stages_of_different_sizes_and_kinds():
    residual = ResidualQuantizer(
        [VectorQuantizer(4, 16), GroupedQuantizer([VectorQuantizer(2, 8)] * 2), LFQ(4)]
    )
    assert residual.codebook_sizes == (16, 8, 8, 16)
    assert (residual.codebook_size, residual.num_codebooks, residual.dim) == (16, 4, 4)
    assert residual.bits_per_token == 14.0
    out = residual(torch.randn(6, 4))
    assert out.indices.shape == (6, 4)
    assert len(out.selections) == len(residual.codebooks) == 3
    uneven = ResidualQuantizer([VectorQuantizer(4, 16), VectorQuantizer(4, 5)])
    logits = uneven.logits(torch.randn(6, 4))
    assert logits.shape == (6, 2, 16)
    assert (logits[:, 1, 5:] == -torch.inf).all()
    assert logits[:, 1, :5].isfinite().all()
    assert logits[:, 0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_teacher_forced_logits_equal_a_hand_written_loop(temperature):
    residual, x = plain(3), torch.randn(20, 4)
    given = torch.randint(16, (20, 3))
    given[:5, 1] = -1  # nothing is subtracted
    rest, expected = x, []
    for stage, indices in zip(residual.stages, given.T, strict=True):
        expected.append(stage.logits(rest, temperature=temperature))
        rest = rest - torch.where(indices[:, None] >= 0, stage.codebook.codes()[indices], 0.0)
    logits = residual.logits(x, temperature=temperature, indices=given)
    assert_close(logits, torch.stack(expected, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_logits_rank_the_choices_of_the_stages_first(dtype):
    residual, x = plain(3, k=64), torch.randn(500, 4).to(dtype)
    logits = residual.logits(x)
    # Two ways to compute a distance can disagree where two codes are as near.
    assert (logits.argmax(dim=-1) == residual.encode(x)).float().mean() > 0.999
    exactly(residual.logits(x, indices=residual.encode(x)), logits)


def test_gradients_of_logits_reach_the_input_and_the_stage_that_is_asked():
    residual, x = plain(2), torch.randn(9, 4, requires_grad=True)
    first, second = (part.codebook.weight for part in residual.stages)
    loss = residual.logits(x)[:, 1].softmax(dim=-1)[:, 0].sum()
    of_x, of_first, of_second = torch.autograd.grad(loss, [x, first, second])
    assert of_x.any()
    assert of_second.any()
    assert not of_first.any()  # what an earlier stage chose is a constant


def test_prefixes_decode_to_partial_sums():
    residual = plain(4)
    indices = residual.encode(torch.randn(9, 4))
    total = torch.zeros(9, 4)
    for number, stage in enumerate(residual.stages):
        total = total + stage.codebook.codes()[indices[:, number]]
        coarse = torch.where(torch.arange(4) <= number, indices, -1)
        exactly(residual.decode(coarse), total)


def test_assign_returns_what_forward_returned():
    residual = plain(3)
    x, mask = torch.randn(12, 4, requires_grad=True), torch.rand(12) > 0.3
    out = residual(x, mask)
    again = residual.quantize_as(x, out.indices)
    exactly(again.quantized, out.quantized)
    exactly(again.indices, out.indices)
    exactly(again.terms, out.terms)


def test_assign_takes_partial_choices_and_leaves_out_what_is_not_finite():
    residual, x = plain(2), torch.randn(3, 4)
    x[2, 0] = torch.nan
    given = torch.tensor([[1, -1], [-1, 5], [3, 4]])
    out = residual.quantize_as(x, given)
    assert out.indices.tolist() == [[1, -1], [-1, 5], [-1, -1]]
    first, second = (stage.codebook.codes().detach() for stage in residual.stages)
    exactly(out.quantized, torch.stack([first[1], second[5], torch.zeros(4)]))
    errors = [(x[0] - first[1]).square().mean(), (x[1] - second[5]).square().mean()]
    assert_close(out.terms["commitment"], 0.25 * sum(errors) / 2)


def test_finer_stages_of_residual_fsq_lower_the_error():
    class Gain(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain = gain

        def forward(self, x):
            return self.gain * x

    stages = [
        ProjectedQuantizer(FSQ([5, 5], symmetric=True), Gain(4.0**i), Gain(4.0**-i))
        for i in range(4)
    ]
    x = 2 * torch.rand(500, 2) - 1
    errors = [
        (x - ResidualQuantizer(stages[:count])(x).quantized).square().mean().item()
        for count in range(1, 5)
    ]
    assert all(finer < coarser for coarser, finer in itertools.pairwise(errors))


def test_rules_keep_the_stages_apart():
    residual = plain(3)
    ema = CodebookEMA(residual, decay=0.5)
    twins = [VectorQuantizer(4, 16) for _ in range(3)]
    for twin, stage in zip(twins, residual.stages, strict=True):
        twin.load_state_dict(stage.state_dict())
    rules = [CodebookEMA(twin, decay=0.5) for twin in twins]
    x = torch.randn(60, 4)
    for rule, out in zip(rules, loop(twins, x)[0], strict=True):
        rule.step(out)
    ema.step(residual(x))
    for stage, twin in zip(residual.stages, twins, strict=True):
        assert_close(state(stage), state(twin))


def test_repr_shows_options():
    assert repr(plain(1, dropout=0.5)).splitlines()[1] == "  dropout=0.5, beam_size=1"
