"""Against ``FSQ``, ``LFQ`` (both kinds) and ``SimVQ``: values, indices, losses, gradients."""

import pytest
import torch

from vqprior import BSQ, FSQ, LFQ, interop
from vqprior.functional import rotation_trick

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="the extra `peers` is not installed: nothing to compare with"
)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# Of entropies: the logarithm there is cut off at 1e-5, which shows in the sixth digit.
TOGETHER = {"rtol": 0.0, "atol": 5e-6}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


def reversed_bits(indices, bits):
    """The first feature is the lowest bit here and the highest there."""
    return sum(((indices >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))


def gradients(quantized, loss, x, direction):
    (grad,) = torch.autograd.grad((quantized * direction).sum() + loss, x)
    return grad


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4), (7, 5, 5, 5, 5)])
def test_fsq(levels, symmetric):
    ours = FSQ(levels, symmetric=symmetric)
    theirs = peer.FSQ(list(levels), preserve_symmetry=symmetric).train()
    x = (2 * torch.randn(2, 200, len(levels))).requires_grad_()
    direction = torch.randn_like(x)
    out, (quantized, indices) = ours(x), theirs(x)
    assert torch.equal(out.indices, indices.long())
    torch.testing.assert_close(out.quantized, quantized, **CLOSE)
    torch.testing.assert_close(ours.decode(indices), theirs.indices_to_codes(indices), **CLOSE)
    torch.testing.assert_close(
        gradients(out.quantized, 0.0, x, direction),
        gradients(quantized, 0.0, x, direction),
        **CLOSE,
    )


@pytest.mark.parametrize("spread", [0.002, 0.02, 1.0])
def test_lfq(spread):
    bits = 5
    ours = LFQ(bits, commitment_weight=0.25, sample_entropy_weight=0.1, batch_entropy_weight=0.15)
    theirs = peer.LFQ(
        dim=bits, commitment_loss_weight=0.25, entropy_loss_weight=0.1, diversity_gamma=1.5
    ).train()
    x = (spread * torch.randn(2, 200, bits)).requires_grad_()
    direction = torch.randn_like(x)
    out = ours(x)
    (quantized, indices, loss), parts = theirs(x, return_loss_breakdown=True)
    assert torch.equal(out.indices, reversed_bits(indices.long(), bits))
    assert torch.equal(out.quantized, quantized.detach().round())
    torch.testing.assert_close(out.terms["commitment"], 0.25 * parts.commitment, **CLOSE)
    entropy = 0.1 * parts.per_sample_entropy - 0.15 * parts.batch_entropy
    torch.testing.assert_close(out.terms["entropy"], entropy, **TOGETHER)
    torch.testing.assert_close(out.loss, loss, **TOGETHER)
    ours_grad = gradients(out.quantized, out.loss, x, direction)
    their_grad = gradients(quantized, loss, x, direction)
    torch.testing.assert_close(ours_grad, their_grad, **TOGETHER)


def test_bsq_is_the_spherical_lfq():
    bits = 6
    ours = BSQ(bits, commitment_weight=0.25, temperature=0.05)
    theirs = peer.LFQ(dim=bits, commitment_loss_weight=0.25, spherical=True).train()
    x = torch.randn(2, 200, bits, requires_grad=True)
    direction = torch.randn_like(x)
    out = ours(x)
    quantized, indices, loss = theirs(x, inv_temperature=20.0)
    assert torch.equal(out.indices, reversed_bits(indices.long(), bits))
    torch.testing.assert_close(out.quantized, quantized, **CLOSE)
    torch.testing.assert_close(out.loss, loss, rtol=0.0, atol=2e-4)
    torch.testing.assert_close(
        gradients(out.quantized, 0.0, x, direction),
        gradients(quantized, 0.0, x, direction),
        **CLOSE,
    )


@pytest.mark.parametrize("rotates", [False, True])
def test_sim_vq(rotates):
    theirs = peer.SimVQ(8, 16, rotation_trick=rotates).train()
    ours = interop.from_vqp_sim_vq(theirs.state_dict())
    if rotates:
        ours.estimator = rotation_trick
    x = torch.randn(2, 200, 8, requires_grad=True)
    direction = torch.randn_like(x)
    out, (quantized, indices, loss) = ours(x), theirs(x)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, quantized, **CLOSE)
    torch.testing.assert_close(out.loss, loss, **CLOSE)
    weights = ours.codebook.module.weight, theirs.code_transform.weight
    ours_grads = torch.autograd.grad((out.quantized * direction).sum() + out.loss, (x, weights[0]))
    their_grads = torch.autograd.grad((quantized * direction).sum() + loss, (x, weights[1]))
    for ours_grad, their_grad in zip(ours_grads, their_grads, strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-4, atol=1e-5)
