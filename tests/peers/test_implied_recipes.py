"""What the page on moving over puts in place of ``FSQ`` and ``LFQ``, scaled and residual."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vqprior import FSQ, LFQ, ProjectedQuantizer, ResidualQuantizer
from vqprior.functional import straight_through

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="the extra `peers` is not installed: nothing to compare with"
)
PAGE = Path(__file__).parents[2] / "docs" / "moving_over.md"
if not PAGE.exists():
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# Of entropies: the logarithm there is cut off at 1e-5, which shows in the sixth digit.
TOGETHER = {"rtol": 0.0, "atol": 5e-6}


@pytest.fixture(scope="module")
def page():
    """The names that the examples of the page define."""
    names = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(13)


def tokens(dim=8, count=200):
    return torch.randn(2, count, dim, requires_grad=True)


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **(tolerance or CLOSE))


def gradient(value, *inputs):
    return torch.autograd.grad(value, inputs)


def nearly(ours, theirs):
    """But for the gradient that the cut-off logarithm there loses at some tokens."""
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def reversed_bits(indices, bits):
    """The first feature is the lowest bit here and the highest there."""
    return sum(((indices >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))


@pytest.mark.parametrize("size", [0.05, 1.0])
def test_residual_lfq(page, size):
    theirs = peer.ResidualLFQ(
        dim=8, codebook_size=256, num_quantizers=4, commitment_loss_weight=0.25
    ).train()
    ours, x = page["residual_lfq"], (size * tokens()).detach().requires_grad_()
    out, (quantized, indices, losses) = ours(x), theirs(x)
    assert torch.equal(out.indices, reversed_bits(indices, 8))
    close(out.quantized, quantized)
    close(out.loss, losses.mean(), **TOGETHER)
    # Of the loss alone: that of the codes is the identity once here and once per stage there.
    nearly(gradient(out.loss, x)[0], gradient(losses.mean(), x)[0])
    direction = torch.randn_like(x)
    (ours_grad,) = gradient((ours(x).quantized * direction).sum(), x)
    (their_grad,) = gradient((theirs(x)[0] * direction).sum(), x)
    close(4 * ours_grad, their_grad)


def test_commitment_of_residual_lfq_pulls_toward_the_codes_in_use(page):
    """With features that are codes, nothing is left to pull."""
    first, *_ = page["residual_lfq"].stages
    last = page["lfq_stage"](0.125)
    for stage, scale in ((first, 1.0), (last, 0.125)):
        code = scale * torch.randn(20, 8).sign()
        assert float(stage(code).terms["commitment"]) == 0.0


@pytest.mark.parametrize("hard", [True, False])
def test_residual_fsq(page, hard):
    theirs = peer.ResidualFSQ(levels=[8, 5, 5], num_quantizers=4, bound_hard_clamp=hard).train()
    x = (3 * tokens(3, 2000)).detach().requires_grad_()
    if hard:
        ours = page["residual_fsq"]
    else:
        scales = [page["levels"] ** -stage for stage in range(4)]
        fsq, scale = FSQ([8, 5, 5], symmetric=True), page["Scale"]
        ours = ResidualQuantizer([ProjectedQuantizer(fsq, scale(1 / s), scale(s)) for s in scales])
    out, (quantized, indices) = ours(x), theirs(x)
    assert torch.equal(out.indices, indices.long())
    close(out.quantized, quantized)
    assert gradient(out.quantized.sum(), x)[0].isfinite().all()


def test_residual_lfq_with_soft_clamps(page):
    theirs = peer.ResidualLFQ(
        dim=8,
        codebook_size=256,
        num_quantizers=4,
        commitment_loss_weight=0.25,
        soft_clamp_input_value=2.0,
    ).train()
    stages = []
    for scale in (1.0, 0.5, 0.25, 0.125):
        stage = page["lfq_stage"](scale)
        down = nn.Sequential(page["SoftClamp"](2 * scale), stage.down)
        stages.append(ProjectedQuantizer(stage.quantizer, down, stage.up))
    x = tokens()
    out, (quantized, _, losses) = ResidualQuantizer(stages)(x), theirs(x)
    close(out.quantized, quantized)
    close(out.loss, losses.mean(), **TOGETHER)


def test_residual_fsq_with_projections(page):
    theirs = peer.ResidualFSQ(levels=[8, 5, 5], num_quantizers=4, dim=6).train()
    plain = page["residual_fsq"]
    down, x = nn.Sequential(theirs.project_in, plain.down), 3 * tokens(6)
    ours = ProjectedQuantizer(plain.quantizer, down, theirs.project_out, dim=6)
    out, (quantized, indices) = ours(x), theirs(x)
    assert torch.equal(out.indices, indices.long())
    close(out.quantized, quantized)


def test_scale_of_lfq(page):
    theirs = peer.LFQ(codebook_size=256, codebook_scale=0.5, commitment_loss_weight=0.25).train()
    ours, x = page["lfq_stage"](0.5), tokens()
    out, (quantized, _, loss) = ours(x), theirs(x)
    close(out.quantized, quantized)
    close(out.loss, loss, **TOGETHER)
    nearly(gradient(out.loss, x)[0], gradient(loss, x)[0])


def test_softplus_of_entropies_of_lfq():
    theirs = peer.LFQ(
        codebook_size=32,
        experimental_softplus_entropy_loss=True,
        entropy_loss_weight=0.1,
        diversity_gamma=2.0,
        entropy_loss_offset=1.0,
    ).train()
    ours = LFQ(5, commitment_weight=0.0, sample_entropy_weight=1.0, batch_entropy_weight=2.0)
    x = tokens(5)
    close(0.1 * F.softplus(ours(x).terms["entropy"] + 1.0), theirs(x)[2], **TOGETHER)


def test_activation_of_lfq():
    theirs = peer.LFQ(
        codebook_size=32, straight_through_activation=nn.Tanh(), commitment_loss_weight=0.25
    ).train()
    x, direction = tokens(5), torch.randn(2, 200, 5)
    out, (quantized, _, loss) = LFQ(5)(x), theirs(x)
    activated = straight_through(torch.tanh(x), out.quantized)
    close(activated, quantized)
    close(out.loss, loss, **TOGETHER)
    ours_grad = gradient((activated * direction).sum(), x)[0]
    close(ours_grad, gradient((quantized * direction).sum(), x)[0])


@pytest.mark.parametrize("name", ["FSQ", "LFQ"])
def test_rotation(name):
    options = {"levels": [5, 5, 5]} if name == "FSQ" else {"codebook_size": 8}
    theirs = getattr(peer, name)(orthogonal_rotation=True, **options).eval()
    down, up = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        down.weight.copy_(theirs.orthogonal_rot.T)
        up.weight.copy_(theirs.orthogonal_rot)
    ours = ProjectedQuantizer(FSQ([5, 5, 5]) if name == "FSQ" else LFQ(3), down, up)
    x = tokens(3)
    close(ours(x).quantized, theirs(x)[0])
