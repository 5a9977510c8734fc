"""What the page on moving over puts in place of options of searching classes has their numbers."""

import pytest
import torch
from torch import nn

from vqprior import (
    EmbeddingCodebook,
    MultiScaleQuantizer,
    RandomProjectionQuantizer,
    ResidualQuantizer,
    TransformedCodebook,
    VectorQuantizer,
    interop,
)
from vqprior.functional import (
    IndexBackpropagation,
    entropy_loss,
    index_cross_entropy,
    orthogonality_loss,
    sample_indices,
)

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="the extra `peers` is not installed: nothing to compare with"
)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(13)


def tokens(dim=8, count=200):
    return torch.randn(2, count, dim, requires_grad=True)


def spread(theirs):
    """With codes as far apart as tokens, so that all of them are chosen."""
    theirs._codebook.embed.copy_(torch.randn_like(theirs._codebook.embed))
    return theirs.train()


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **(tolerance or CLOSE))


def gradient(value, *inputs):
    return torch.autograd.grad(value, inputs)


# -- losses of VectorQuantize


def scores(vq, x):
    return -torch.cdist(x, vq.codebook.codes())


def test_cross_entropies():
    theirs = spread(
        peer.VectorQuantize(8, 16, commitment_use_cross_entropy_loss=True, rotation_trick=False)
    )
    ours, x = interop.from_vqp_vector_quantize(theirs.state_dict()), tokens()
    out, (_, indices, loss) = ours(x), theirs(x, freeze_codebook=True)
    assert torch.equal(out.indices, indices)
    close(index_cross_entropy(scores(ours, x), out.indices), loss)
    # Squared distances make another loss.
    assert (index_cross_entropy(ours.logits(x), out.indices) - loss).abs() > 0.1
    given = torch.randint(-1, 16, (2, 200))
    _, loss = theirs(x, indices=given, freeze_codebook=True)
    close(index_cross_entropy(scores(ours, x), given), loss)


def test_diversity():
    theirs = spread(
        peer.VectorQuantize(
            8,
            16,
            codebook_diversity_loss_weight=1.0,
            codebook_diversity_temperature=2.0,
            commitment_weight=0.0,
        )
    )
    ours, x = interop.from_vqp_vector_quantize(theirs.state_dict()), tokens().reshape(400, 1, 8)
    loss = theirs(x, freeze_codebook=True)[2]
    close(entropy_loss(scores(ours, x) * 2.0, sample_weight=0.0), loss)


def test_sampled_codes():
    theirs = spread(
        peer.VectorQuantize(8, 4, stochastic_sample_codes=True, sample_codebook_temp=0.5)
    )
    ours, x = interop.from_vqp_vector_quantize(theirs.state_dict()), torch.randn(1, 1, 8)
    x = x.expand(1, 20000, 8)
    drawn = sample_indices(scores(ours, x), temperature=0.5)
    _, indices, _ = theirs(x, freeze_codebook=True)
    shares = [found.flatten().bincount(minlength=4) / 20000 for found in (drawn, indices)]
    close(*shares, rtol=0.0, atol=0.02)


@pytest.mark.parametrize("active", [False, True])
def test_orthogonality(active):
    theirs = peer.VectorQuantize(
        8,
        64,
        orthogonal_reg_weight=10.0,
        orthogonal_reg_active_codes_only=active,
        commitment_weight=0.0,
        ema_update=False,
    ).train()
    _, indices, loss = theirs(tokens(count=20))
    codes = theirs.codebook
    close(10 * orthogonality_loss(codes[indices.unique()] if active else codes), loss)


# -- gradients of VectorQuantize


def test_codes_that_learn():
    theirs = peer.VectorQuantize(
        8, 16, learnable_codebook=True, ema_update=False, rotation_trick=False
    ).train()
    ours, x = interop.from_vqp_vector_quantize(theirs.state_dict()), tokens()
    ours.commitment_weight, ours.codebook_weight, ours.unused_weight = 1.0, 1.0, 0.0
    out, (_, _, loss) = ours(x), theirs(x)
    close(out.loss, 2 * loss)
    ours_grads = gradient(out.loss, x, ours.codebook.weight)
    their_grads = gradient(loss, x, theirs._codebook.embed)
    for ours_grad, their_grad in zip(ours_grads, their_grads, strict=True):
        close(ours_grad, their_grad.reshape(ours_grad.shape))


def test_bridge():
    bridge = nn.Linear(8, 8)
    theirs = peer.VectorQuantize(8, 16, vq_bridge=bridge, rotation_trick=False).train()
    table = EmbeddingCodebook.from_codes(theirs._codebook.embed.detach()[0])
    ours = VectorQuantizer(8, 16, codebook=TransformedCodebook(table, bridge))
    x = tokens()
    out, (quantized, indices, _) = ours(x), theirs(x)
    assert torch.equal(out.indices, indices)
    close(out.quantized, quantized)


def test_gradients_to_the_codes():
    theirs = peer.VectorQuantize(
        8,
        16,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
        route_gradients_to_input=False,
        commitment_weight=0.0,
    ).train()
    ours, x = interop.from_vqp_vector_quantize(theirs.state_dict()), tokens()
    ours.estimator = lambda x, codes: codes
    direction = torch.randn_like(x)
    (ours_grad,) = gradient((ours(x).quantized * direction).sum(), ours.codebook.weight)
    (their_grad,) = gradient((theirs(x)[0] * direction).sum(), theirs._codebook.embed)
    close(ours_grad, their_grad[0])


def test_gradients_through_the_choice():
    theirs = peer.VectorQuantize(
        8,
        16,
        use_cosine_sim=True,
        straight_through=True,
        rotation_trick=False,
        route_gradients_to_input=False,
        commitment_weight=0.0,
    ).train()
    ours = interop.from_vqp_vector_quantize(theirs.state_dict(), metric="cosine")
    ours.quantizer.estimator = IndexBackpropagation()
    x, direction = tokens(), torch.randn(2, 200, 8)
    (ours_grad,) = gradient((ours(x).quantized * direction).sum(), x)
    (their_grad,) = gradient((theirs(x, freeze_codebook=True)[0] * direction).sum(), x)
    close(ours_grad, their_grad, rtol=1e-4, atol=1e-5)


# -- arguments of a call, and the classes built from others


def test_lengths_and_padding():
    theirs = peer.VectorQuantize(
        8, 16, rotation_trick=False, return_zeros_for_masked_padding=False
    ).train()
    ours, x = interop.from_vqp_vector_quantize(theirs.state_dict()), tokens()
    lens = torch.tensor([20, 150])
    mask = torch.arange(200) < lens.unsqueeze(1)
    out, (quantized, _, loss) = ours(x, mask), theirs(x, lens=lens, freeze_codebook=True)
    close(out.terms["commitment"], loss)
    close(torch.where(mask.unsqueeze(-1), out.quantized, x), quantized)


def test_nearest_codes():
    theirs = peer.VectorQuantize(8, 16).eval()
    ours, x = interop.from_vqp_vector_quantize(theirs.state_dict()), tokens()
    assert torch.equal(ours.nearest_indices(x, 3), theirs(x, topk=3)[1])


def test_beams_end_nearer_than_there():
    theirs = peer.ResidualVQ(dim=8, num_quantizers=3, codebook_size=16, beam_size=4)
    for layer in theirs.layers:
        spread(layer)
    theirs.eval()
    ours, x = interop.from_vqp_residual_vq(theirs.state_dict()), tokens().detach()
    ours.beam_size = 4
    errors = [(q - x).square().mean() for q in (ours(x).quantized, theirs(x)[0])]
    assert errors[0] < errors[1]


def test_weights_of_sim_vq():
    theirs = peer.SimVQ(
        8, 16, rotation_trick=False, input_to_quantize_commit_loss_weight=0.5, commitment_weight=3.0
    ).train()
    ours, x = interop.from_vqp_sim_vq(theirs.state_dict()), tokens()
    ours.commitment_weight, ours.codebook_weight = 3 * 0.5, 3 * 1.0
    close(ours(x).loss, theirs(x)[2])


def test_residual_sim_vq():
    theirs = peer.ResidualSimVQ(
        dim=8, codebook_size=16, num_quantizers=3, rotation_trick=False
    ).train()
    state, x = theirs.state_dict(), tokens()
    stages = [interop.from_vqp_sim_vq(state, prefix=f"layers.{stage}.") for stage in range(3)]
    out, (quantized, indices, losses) = ResidualQuantizer(stages)(x), theirs(x)
    assert torch.equal(out.indices, indices)
    close(out.quantized, quantized)
    close(out.loss, losses.mean())


def test_random_projection():
    theirs = peer.RandomProjectionQuantizer(dim=8, codebook_size=16, codebook_dim=4, norm=False)
    ours = RandomProjectionQuantizer(8, 16, code_dim=4)
    ours.projection.copy_(theirs.rand_projs[0])
    ours.codes.copy_(theirs.vq._codebook.embed[0])
    x = tokens()
    assert torch.equal(ours.encode(x), theirs(x))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_hierarchical_vq(dimensions):
    """There maps of two dimensions are enlarged bilinearly, here bicubically."""
    theirs = peer.HierarchicalVQ(
        dim=8,
        codebook_size=16,
        scales=(1, 2, 4),
        quant_resi=0.0,
        kmeans_init=False,
        accept_image_fmap=dimensions == 2,
        accept_3d_fmap=dimensions == 3,
    )
    spread(theirs.vq)
    theirs.eval()
    inner = interop.from_vqp_vector_quantize(theirs.state_dict(), prefix="vq.")
    ours = MultiScaleQuantizer(inner, [(scale,) * dimensions for scale in (1, 2, 4)])
    x = torch.randn(2, 8, *[4] * dimensions)
    out, (quantized, indices, _) = ours(x.movedim(1, -1)), theirs(x)
    same = torch.equal(out.indices, torch.cat([found.flatten(1) for found in indices], dim=1))
    assert same == (dimensions != 2)
    if same:
        close(out.quantized.movedim(-1, 1), quantized)
