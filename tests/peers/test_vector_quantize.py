"""Against ``VectorQuantize`` and ``ResidualVQ``: moving averages, stages, rotation trick."""

import pytest
import torch

from vqprior import CodebookEMA, interop
from vqprior.functional import commitment_loss, rotation_trick, straight_through

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="the extra `peers` is not installed: nothing to compare with"
)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def pair(metric, decay, **options):
    """A quantizer there, and one here with the same codes and its moving average."""
    cosine = metric == "cosine"
    theirs = peer.VectorQuantize(
        8, 16, decay=decay, use_cosine_sim=cosine, rotation_trick=False, **options
    ).train()
    ours = interop.from_vqp_vector_quantize(theirs.state_dict(), metric=metric)
    return ours, theirs, CodebookEMA(ours, decay=decay, eps=theirs.eps)


@pytest.mark.parametrize("decay", [0.8, 0.99])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_moving_average_of_codes_that_are_all_chosen(metric, decay):
    ours, theirs, ema = pair(metric, decay)
    for _ in range(5):
        x = torch.randn(2, 500, 8, requires_grad=True)
        out = ours(x)
        quantized, indices, loss = theirs(x)
        assert indices.unique().numel() == 16, "the comparison is of codes that are chosen"
        assert torch.equal(out.indices, indices)
        torch.testing.assert_close(out.quantized, quantized, **CLOSE)
        torch.testing.assert_close(out.loss, loss, **CLOSE)
        (ours_grad,) = torch.autograd.grad(out.quantized.square().sum() + out.loss, x)
        (their_grad,) = torch.autograd.grad(quantized.square().sum() + loss, x)
        torch.testing.assert_close(ours_grad, their_grad, **CLOSE)
        ema.step(out)
        torch.testing.assert_close(ours.codebooks[0].codes(), theirs.codebook, **CLOSE)


def test_moving_average_where_some_codes_are_not_chosen():
    """Those stay here, and shrink there as their counts vanish."""
    ours, theirs, ema = pair("euclidean", 0.5)
    start = theirs.codebook.clone()
    seen = torch.zeros(16, dtype=torch.bool)
    for _ in range(40):
        x = 0.01 * torch.randn(1, 400, 8) + start[:4].repeat(1, 100, 1)
        out = ours(x)
        theirs(x)
        ema.step(out)
        hit = torch.zeros(16, dtype=torch.bool).index_fill_(0, out.indices.flatten(), value=True)
        seen |= hit
        torch.testing.assert_close(
            ours.codebooks[0].codes()[hit], theirs.codebook[hit], rtol=1e-3, atol=1e-3
        )
    assert 0 < seen.sum() < 16
    assert torch.equal(ours.codebooks[0].codes()[~seen], start[~seen])
    assert (theirs.codebook[~seen].norm(dim=1) < start[~seen].norm(dim=1)).all()


@pytest.mark.parametrize("cosine", [False, True])
def test_residual_stages(cosine):
    theirs = peer.ResidualVQ(
        dim=8, num_quantizers=4, codebook_size=16, use_cosine_sim=cosine, rotation_trick=False
    ).train()
    metric = "cosine" if cosine else "euclidean"
    ours = interop.from_vqp_residual_vq(theirs.state_dict(), metric=metric)
    x = torch.randn(2, 200, 8)
    out = ours(x)
    quantized, indices, losses = theirs(x, freeze_codebook=True)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized, **CLOSE)
    by_stage = torch.stack([commitment_loss(selection) for selection in out.selections])
    torch.testing.assert_close(by_stage, losses, **CLOSE)
    torch.testing.assert_close(out.terms["commitment"], losses.sum(), **CLOSE)
    torch.testing.assert_close(ours.decode(indices), theirs.get_output_from_indices(indices))


def test_residual_moving_averages():
    """Each layer there updates by its own residual, as each stage does here."""
    theirs = peer.ResidualVQ(
        dim=8, num_quantizers=3, codebook_size=8, decay=0.8, rotation_trick=False
    ).train()
    ours = interop.from_vqp_residual_vq(theirs.state_dict())
    ema = CodebookEMA(ours, decay=0.8)
    for _ in range(5):
        x = torch.randn(2, 1000, 8)
        out = ours(x)
        _, indices, _ = theirs(x)
        assert torch.equal(out.indices, indices)
        assert all(indices[..., stage].unique().numel() == 8 for stage in range(3))
        ema.step(out)
        vectors = torch.stack([codebook.codes() for codebook in ours.codebooks])
        torch.testing.assert_close(vectors, theirs.codebooks, **CLOSE)


def test_gradient_of_residual_stages_is_the_identity_once():
    """There it is the identity once for each stage, four times in all."""
    theirs = peer.ResidualVQ(
        dim=8, num_quantizers=4, codebook_size=16, commitment_weight=0.0, rotation_trick=False
    ).train()
    ours = interop.from_vqp_residual_vq(theirs.state_dict())
    x = torch.randn(2, 20, 8, requires_grad=True)
    direction = torch.randn(2, 20, 8)
    (ours_grad,) = torch.autograd.grad(ours(x).quantized, x, direction)
    (their_grad,) = torch.autograd.grad(theirs(x)[0], x, direction)
    torch.testing.assert_close(ours_grad, direction)
    torch.testing.assert_close(their_grad, 4 * direction)


@pytest.mark.parametrize("estimator", [rotation_trick, straight_through])
def test_gradient_estimators(estimator):
    rotates = estimator is rotation_trick
    theirs = peer.VectorQuantize(8, 16, commitment_weight=0.0, rotation_trick=rotates).train()
    ours = interop.from_vqp_vector_quantize(theirs.state_dict())
    ours.estimator = estimator
    x = torch.randn(2, 200, 8, requires_grad=True)
    direction = torch.randn(2, 200, 8)
    (ours_grad,) = torch.autograd.grad(ours(x).quantized, x, direction)
    quantized, *_ = theirs(x, freeze_codebook=True)
    (their_grad,) = torch.autograd.grad(quantized, x, direction)
    torch.testing.assert_close(ours_grad, their_grad, rtol=1e-4, atol=1e-5)
    # The value there is rotated too; here it is the code, bit for bit.
    torch.testing.assert_close(ours(x).quantized, quantized, **CLOSE)
