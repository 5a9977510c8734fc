"""`check_quantizer`: a quantizer that keeps the laws passes, and each broken law is named."""

import re

import pytest
import torch

from tests.contracts.factories import QUANTIZERS, REPRESENTATIVE
from vqprior import QuantizerWrapper, VectorQuantizer
from vqprior.testing import check_quantizer


def vq():
    return VectorQuantizer(dim=4, codebook_size=16)


class WrongSize(QuantizerWrapper):
    dim = 5


class RoundsOff(QuantizerWrapper):
    def decode(self, indices):
        return 1.01 * self.quantizer.decode(indices)


class ForgetsToEncode(QuantizerWrapper):
    def encode(self, x, mask=None):
        return self.quantizer.encode(-x, mask)


class Remembers(QuantizerWrapper):
    def __init__(self, quantizer):
        super().__init__(quantizer)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, mask=None):
        self.calls += 1
        return self.quantizer(x, mask)


class Draws(QuantizerWrapper):
    def forward(self, x, mask=None):
        torch.rand(1)
        return self.quantizer(x, mask)


class IgnoresTheMask(QuantizerWrapper):
    def forward(self, x, mask=None):
        return self.quantizer(x)


class FollowsAutocast(QuantizerWrapper):
    def forward(self, x, mask=None):
        return self.quantizer(x @ torch.eye(4), mask)


class DecodesToFloat32(QuantizerWrapper):
    def decode(self, indices):
        return self.quantizer.decode(indices).float()


class Waits(QuantizerWrapper):
    def forward(self, x, mask=None):
        return self.quantizer(x if torch.count_nonzero(x).item() >= 0 else -x, mask)


class Forgets(QuantizerWrapper):
    def __deepcopy__(self, memo):
        return Forgets(vq()).eval()


class TakesAnything(QuantizerWrapper):
    def decode(self, indices):
        return self.quantizer.decode(indices.long().clamp_max(15))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongSize, "result: `dim` is 5"),
        (RoundsOff, "decode: `decode(out.indices)` differs from `out.quantized`"),
        (ForgetsToEncode, "decode: `encode(x)` differs from `forward`"),
        (Remembers, "purity: a call in training mode changed `calls`"),
        (Draws, "purity: a call in eval mode drew a random number"),
        (IgnoresTheMask, "gradient: a masked token has a gradient"),
        (FollowsAutocast, "precision: autocast changes `indices`"),
        (DecodesToFloat32, "precision: `decode` of a bfloat16 module is not bfloat16"),
        (Waits, "graph: a call synchronizes the device: aten::_local_scalar_dense"),
        (Forgets, "state: `deepcopy` changes"),
        (TakesAnything, "errors: a float tensor of `indices` is accepted silently"),
    ],
)
def test_a_broken_law_is_named(kind, message):
    with pytest.raises(AssertionError, match=rf"^{re.escape(message)}"):
        check_quantizer(lambda: kind(vq()), dim=4, shape=(40, 9))


def test_what_is_broken_by_design_is_skipped():
    with pytest.raises(AssertionError, match=r"^purity: "):
        check_quantizer(lambda: Draws(vq()), dim=4)
    check_quantizer(lambda: Draws(vq()), dim=4, skip=("purity",))


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"^`make` must be callable, got int"):
        check_quantizer(3, dim=4)
    with pytest.raises(ValueError, match=r"^`dim` must be at least 1, got 0\.$"):
        check_quantizer(vq, dim=0)
    with pytest.raises(ValueError, match=r"^`skip` must name laws, got speed\. Choose from result"):
        check_quantizer(vq, dim=4, skip=("speed",))


# What is broken by design; a texture quantizer takes two tensors, and -1 decodes to its structure.
BROKEN = {
    "self-updating": ("purity",),
    "require-finite": ("graph", "mask"),
    "texture": ("decode", "mask"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(REPRESENTATIVE))
def test_what_ships_passes(name):
    make, shape = QUANTIZERS[name], (3, 4, 5) if name == "multi-scale" else (4, 9)
    check_quantizer(make, make().dim, shape=shape, skip=BROKEN.get(name, ()))
