"""`ResidualQuantizer`: stages that are left out in training."""

import pytest
import torch
from torch.testing import assert_close

from tests.quantizers.stages import exactly, plain
from vqprior import (
    CodebookRevival,
    GroupedQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)


def lengths(indices):
    """How many stages each sample kept, which must be a prefix of them, for all its tokens."""
    kept = (indices >= 0).flatten(1, -2)
    assert (kept == kept[:, :1]).all()
    kept = kept[:, 0]
    length = kept.sum(dim=-1)
    exactly(kept, torch.arange(kept.shape[1]) < length[:, None])
    return length


@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("beam_size", [1, 2])
def test_dropout_keeps_prefixes_of_uniform_length(dropout, beam_size):
    residual = plain(4, k=4, d=2, dropout=dropout, beam_size=beam_size).train()
    n = 4000
    length = lengths(residual(torch.randn(n, 3, 2)).indices)
    assert length.min() == 1
    for kept in range(1, 5):
        probability = dropout / 4 + (1 - dropout) * (kept == 4)
        frequency = (length == kept).float().mean().item()
        assert abs(frequency - probability) < 4 * (probability * (1 - probability) / n) ** 0.5


@pytest.mark.parametrize("beam_size", [1, 3])
def test_dropped_stages_contribute_nothing(beam_size):
    residual = plain(4, dropout=0.9, beam_size=beam_size).train()
    x = torch.randn(40, 3, 4)
    out = residual(x)
    exactly(residual.decode(out.indices), out.quantized)
    for number, selection in enumerate(out.selections):
        kept = out.indices[..., number] >= 0
        assert 0 < kept.sum() < 120 or number == 0
        exactly(selection.mask, kept)
        exactly(selection.indices, out.indices[..., number])
    means = [
        (s.inputs[s.mask] - s.codes[s.mask]).square().mean() for s in out.selections
    ]  # of the samples that kept the stage alone
    assert_close(out.terms["commitment"], 0.25 * sum(means) / len(means))
    full = residual.eval()(x).indices
    assert full.min() >= 0
    if beam_size == 1:
        exactly(out.indices, torch.where(out.indices >= 0, full, -1))


def test_a_dropped_stage_has_no_gradient():
    residual = plain(2, dropout=1.0).train()
    while True:
        out = residual(torch.randn(1, 5, 4))
        if (out.indices[..., 1] == -1).all():
            break
    out.loss.backward()
    assert residual.stages[0].codebook.weight.grad.any()
    assert not residual.stages[1].codebook.weight.grad.any()


def test_dropout_follows_the_global_generator_and_eval_ignores_it():
    residual, x = plain(4, dropout=0.8), torch.randn(50, 4)
    torch.manual_seed(3)
    first = residual.train()(x).indices
    torch.manual_seed(3)
    exactly(residual(x).indices, first)
    assert (residual(x).indices != first).any()
    residual.eval()
    exactly(residual(x).indices, residual.encode(x))
    assert residual.encode(x).min() >= 0
    exactly(residual.train().encode(x), residual.eval().encode(x))


def test_a_single_vector_is_one_sample():
    residual = plain(3, dropout=1.0).train()
    seen = {tuple((residual(torch.randn(4)).indices >= 0).tolist()) for _ in range(60)}
    assert seen == {(True, False, False), (True, True, False), (True, True, True)}


def test_stages_of_groups_draw_once_for_all_groups_with_the_same_codes():
    stages = [[VectorQuantizer(2, 8) for _ in range(2)] for _ in range(3)]
    outer = ResidualQuantizer([GroupedQuantizer(groups) for groups in stages], dropout=1.0)
    inner = GroupedQuantizer([ResidualQuantizer(list(s)) for s in zip(*stages, strict=True)])
    x = torch.randn(50, 6, 4)
    groups_first = inner.encode(x).unflatten(-1, (2, 3)).movedim(-1, -2).flatten(-2)
    exactly(outer.encode(x), groups_first)
    depths = (outer.train()(x).indices.unflatten(-1, (3, 2)) >= 0).sum(dim=-2)
    exactly(depths, depths[:, :1, :1].expand_as(depths))
    assert depths.unique().tolist() == [1, 2, 3]


def test_revival_counts_dropped_stages_as_unused():
    residual = plain(2, dropout=1.0).train()
    revival = CodebookRevival(residual, patience=1000.0)
    out = residual(torch.randn(200, 4))
    revival.step(out)
    assert revival.tokens_0 == 200
    assert revival.tokens_1 == (out.indices[:, 1] >= 0).sum() < 200
