"""`IndexPredictor`: features to logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import IndexPredictor, VectorQuantizer
from vqprior.functional import index_cross_entropy, select_codes


def test_is_layer_norm_and_one_linear_layer():
    predictor = IndexPredictor(8, 5)
    x = torch.randn(2, 3, 8)
    expected = F.layer_norm(x, (8,)) @ predictor.head.weight.T
    assert_close(predictor(x), expected)
    assert sum(p.numel() for p in predictor.parameters()) == 2 * 8 + 8 * 5


def test_several_codebooks_have_their_own_axis():
    predictor = IndexPredictor(8, 5, num_codebooks=3)
    x = torch.randn(2, 7, 8)
    logits = predictor(x)
    assert logits.shape == (2, 7, 3, 5)
    flat = F.layer_norm(x, (8,)) @ predictor.head.weight.T
    assert_close(logits[..., 1, :], flat[..., 5:10])


def test_a_body_runs_first():
    body = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    predictor = IndexPredictor(8, 5, body=body)
    x = torch.randn(4, 8)
    assert_close(predictor(x), predictor.head(predictor.norm(body(x))))
    predictor(x).sum().backward()
    assert all(p.grad is not None for p in body.parameters())


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3, 4)])
def test_leading_dimensions_are_free(leading):
    assert IndexPredictor(8, 5)(torch.randn(*leading, 8)).shape == (*leading, 5)


@pytest.mark.full
def test_learns_indices_and_then_reconstruction():
    """Code level, then image level through the frozen codes: both go down."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 8)
    x = torch.randn(256, 4)
    indices, target = quantizer.encode(x), quantizer(x).quantized.detach()
    predictor = IndexPredictor(
        4, 8, body=nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4))
    )
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)

    def train(loss_of, steps):
        losses = []
        for _ in range(steps):
            loss = loss_of(predictor(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], sum(losses[-5:]) / 5

    first, last = train(lambda logits: index_cross_entropy(logits, indices), 60)
    assert last < 0.5 * first
    codes = quantizer.codebook.weight.detach()
    first, last = train(
        lambda logits: (select_codes(logits, codes)[0] - target).square().mean(), 60
    )
    assert last < first


@pytest.mark.parametrize("name", ["dim", "codebook_size", "num_codebooks"])
def test_sizes_below_1(name):
    sizes = {"dim": 8, "codebook_size": 5, "num_codebooks": 1, name: 0}
    with pytest.raises(ValueError, match=rf"^`{name}` must be at least 1, got 0\.$"):
        IndexPredictor(**sizes)


def test_wrong_features():
    with pytest.raises(
        ValueError, match=r"^`features` must have shape \(\.\.\., 8\), got \(2, 7\)"
    ):
        IndexPredictor(8, 5)(torch.zeros(2, 7))
    with pytest.raises(
        TypeError, match=r"^`features` must be a floating-point tensor, got torch\."
    ):
        IndexPredictor(8, 5)(torch.zeros(2, 8).long())
