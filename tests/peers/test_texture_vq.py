"""Against the quantizer of the TVQ&RAP authors: recorded results of their code.

Inputs and weights are not recorded. They are drawn from names, by a rule that uses integers and
correctly rounded double precision alone, so they are the same everywhere.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from vqprior import ChannelsFirst, interop
from vqprior.functional import select_codes

RECORDED = np.load(Path(__file__).parent.parent / "fixtures" / "texture_vq.npz")
WEIGHTS = {"full": "quantize.embedding.weight", "small": "vq_small.embedding.weight"}
SIZES = {"full": (1024, 256), "small": (32, 8)}
# Recorded noise of float32 is 1e-7 of the largest value; a wrong formula differs by far more.
CLOSE = {"rtol": 0.0, "atol": 2e-6}
every_size = pytest.mark.parametrize("tag", SIZES)


def draw(name, shape):
    """Numbers of mean 0 and deviation 1 from SplitMix64, seeded by the SHA-256 of the name."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    counter = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = np.uint64(start) + counter * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        bits ^= bits >> np.uint64(31)
    # The sum of four uniform 16-bit numbers, standardized.
    fields = np.stack([(bits >> np.uint64(16 * n)) & np.uint64(0xFFFF) for n in range(4)])
    total = fields.sum(axis=0).astype(np.float64)
    values = (total - 131070.0) / np.sqrt((2.0**32 - 1.0) / 3.0)
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


def recorded(name):
    return torch.from_numpy(RECORDED[name])


def relative(ours, theirs):
    """The largest difference, as a share of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def quantizer_of(tag):
    codes = draw(f"w:{WEIGHTS[tag]}", SIZES[tag])
    return ChannelsFirst(interop.from_taming({"embedding.weight": codes}, metric="euclidean"))


def test_the_rule_gives_its_known_answers():
    known = [-0.27129366, 0.46874471, 0.31696297, -1.25796744]
    assert torch.equal(draw("w:selftest", (4,)), torch.tensor(known))


@every_size
def test_quantizer_values_loss_and_gradients(tag):
    vq = quantizer_of(tag)
    shape = RECORDED[f"{tag}_z_q"].shape
    z, direction = draw(f"x:vq_{tag}/z", shape), draw(f"x:vq_{tag}/c", shape)
    z.requires_grad_()
    out = vq(z)
    assert torch.equal(out.indices.flatten(), recorded(f"{tag}_indices").long())
    torch.testing.assert_close(out.quantized, recorded(f"{tag}_z_q"), **CLOSE)
    torch.testing.assert_close(out.loss.reshape(1), recorded(f"{tag}_loss"), **CLOSE)
    (out.loss + (out.quantized * direction).mean()).backward()
    codebook = vq.codebooks[0].codes()
    assert relative(z.grad, recorded(f"{tag}_grad_z")) < 1e-5
    assert relative(codebook.grad, recorded(f"{tag}_grad_codebook")) < 1e-5


@every_size
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_selected_codes(tag, mode):
    codes = quantizer_of(tag).codebooks[0].codes().detach()
    shape = RECORDED[f"{tag}_codebook_feat_{mode}"].shape
    logits = 2 * draw(f"x:vq_{tag}/logits", RECORDED[f"{tag}_grad_logits"].shape)
    vectors, _ = select_codes(logits, codes)
    maps = vectors.transpose(1, 2).reshape(shape)
    torch.testing.assert_close(maps, recorded(f"{tag}_codebook_feat_{mode}"), **CLOSE)


@every_size
def test_gradient_to_the_logits(tag):
    codes = quantizer_of(tag).codebooks[0].codes()
    shape = RECORDED[f"{tag}_codebook_feat_train"].shape
    logits = 2 * draw(f"x:vq_{tag}/logits", RECORDED[f"{tag}_grad_logits"].shape)
    logits.requires_grad_()
    vectors, _ = select_codes(logits, codes.detach())
    maps = vectors.transpose(1, 2).reshape(shape)
    (maps * draw(f"x:vq_{tag}/c", shape)).mean().backward()
    assert relative(logits.grad, recorded(f"{tag}_grad_logits")) < 1e-5
    assert codes.grad is None
