"""`TextureQuantizer`: structure plus what a codebook adds to it."""

import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import ChannelsFirst, TextureQuantizer, VectorQuantizer


class Fuse(nn.Module):
    """Not symmetric, so that swapped arguments show."""

    def __init__(self, dim=4):
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, structure, texture):
        return self.linear(torch.cat([structure, texture], dim=-1))


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def test_the_default_codes_the_conditional_residual():
    inner = VectorQuantizer(4, 16)
    texture, structure = torch.randn(2, 7, 4), 10 * torch.randn(2, 7, 4)
    out = TextureQuantizer(inner)(texture, structure)
    expected = inner(texture - structure)
    exactly(out.quantized, structure + expected.quantized)
    exactly(out.indices, expected.indices)
    exactly(out.loss, expected.loss)
    exactly(vars(out.selections[0]), vars(expected.selections[0]))


def test_a_fuse_module_decides_what_is_coded():
    inner, fuse = VectorQuantizer(4, 16), Fuse()
    quantizer = TextureQuantizer(inner, fuse=fuse)
    texture, structure = torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    out = quantizer(texture, structure)
    expected = inner(fuse.linear(torch.cat([structure, texture], dim=-1)))
    exactly(out.quantized, structure + expected.quantized)
    exactly(quantizer.encode(texture, structure), expected.indices)
    out.quantized.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in fuse.parameters())


def test_a_plain_function_can_fuse():
    quantizer = TextureQuantizer(VectorQuantizer(4, 16), fuse=lambda structure, texture: texture)
    texture = torch.randn(7, 4)
    out = quantizer(texture, torch.zeros(7, 4))
    exactly(out.indices, quantizer.quantizer.encode(texture))


def test_channel_first_inside_takes_feature_maps():
    quantizer = TextureQuantizer(ChannelsFirst(VectorQuantizer(4, 16)))
    texture, structure = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    out = quantizer(texture, structure)
    assert (out.quantized.shape, out.indices.shape) == ((2, 4, 5, 3), (2, 5, 3))
    exactly(quantizer.decode(out.indices, structure), out.quantized)


def test_gradients_reach_the_texture_and_cancel_in_the_structure():
    """With the default fuse, ``structure + (texture - structure)`` is the texture."""
    texture, structure = (torch.randn(7, 4, requires_grad=True) for _ in range(2))
    quantizer = TextureQuantizer(VectorQuantizer(4, 16))
    weight = torch.randn(7, 4)
    (weight * quantizer(texture, structure).quantized).sum().backward()
    assert_close(texture.grad, weight)
    assert_close(structure.grad, torch.zeros(7, 4))


@pytest.mark.parametrize("fuse", [None, Fuse()])
def test_masked_tokens_come_out_as_their_structure(fuse):
    quantizer = TextureQuantizer(VectorQuantizer(4, 16), fuse=fuse)
    texture, structure = torch.randn(7, 4), torch.randn(7, 4)
    mask = torch.arange(7) < 4
    texture[5] = torch.nan
    out = quantizer(texture, structure, mask)
    exactly(out.quantized[~mask], structure[~mask])
    exactly(quantizer.encode(texture, structure, mask), out.indices)
    assert (out.indices[~mask] == -1).all()


@pytest.mark.parametrize("where", ["texture", "structure"])
def test_non_finite_tokens_leave_a_learned_fuse_alone(where):
    fuse = Fuse()
    quantizer = TextureQuantizer(VectorQuantizer(4, 16), fuse=fuse)
    signals = {"texture": torch.randn(7, 4), "structure": torch.randn(7, 4)}
    expected = quantizer(signals["texture"][1:], signals["structure"][1:])
    signals[where][0, 2] = torch.inf
    out = quantizer(**signals)
    assert out.indices[0] == -1
    assert_close(out.loss, expected.loss)
    (out.loss + out.quantized[1:].sum()).backward()
    assert all(p.grad.isfinite().all() for p in fuse.parameters())


def test_a_texture_of_another_size_is_the_business_of_the_fuse():
    pool = TextureQuantizer(
        VectorQuantizer(4, 16), fuse=lambda structure, texture: texture.unflatten(0, (7, 2)).mean(1)
    )
    out = pool(torch.randn(14, 4), torch.randn(7, 4))
    assert out.indices.shape == (7,)


def test_the_structure_keeps_its_dtype_in_decode():
    texture, structure = (torch.randn(7, 4).bfloat16() for _ in range(2))
    for fuse in (None, lambda structure, texture: texture.float() - structure):
        quantizer = TextureQuantizer(VectorQuantizer(4, 16), fuse=fuse).bfloat16()
        out = quantizer(texture, structure)
        exactly(quantizer.decode(out.indices, structure), out.quantized)
        assert out.quantized.dtype == torch.bfloat16


X = torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("fuse", "texture", "structure", "error", "message"),
    [
        (None, X, X[0], ValueError, "`texture` must have shape (4,), got (7, 4)."),
        (None, X, X[:, :3], ValueError, "`texture` must have shape (7, 3), got (7, 4)."),
        (None, X[:, :3], X[:, :3], ValueError, "`x` must have shape (..., 4), got (7, 3)."),
        (None, X.long(), X, TypeError, "`texture` must be a floating-point tensor, got torch.int"),
        (None, X, X.long(), TypeError, "`structure` must be a floating-point tensor, got torch.i"),
        (
            lambda structure, texture: texture[:, :1],
            X,
            X,
            ValueError,
            "`fuse(structure, texture)` must have shape (7, 4), got (7, 1).",
        ),
    ],
)
def test_wrong_arguments(fuse, texture, structure, error, message):
    quantizer = TextureQuantizer(VectorQuantizer(4, 16), fuse=fuse)
    for call in (quantizer, quantizer.encode):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            call(texture, structure)
