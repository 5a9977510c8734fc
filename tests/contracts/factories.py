"""Every quantizer the laws are checked on. Adding a quantizer adds one line to QUANTIZERS."""

import pytest
import torch
from torch import nn

from vqprior import (
    ChannelFirst,
    CodebookEMA,
    CodebookRevival,
    Quantizer,
    SelfUpdating,
    Table,
    TextureQuantizer,
    VectorQuantizer,
)

DIM = 4


class GivenStructure(Quantizer):
    """A ``TextureQuantizer`` whose structure is known, so that it is a ``Quantizer``."""

    def __init__(self, texture_quantizer):
        super().__init__()
        self.texture_quantizer = texture_quantizer

    dim = property(lambda self: self.texture_quantizer.dim)
    codebook_size = property(lambda self: self.texture_quantizer.codebook_size)
    num_codebooks = property(lambda self: self.texture_quantizer.num_codebooks)
    bits_per_token = property(lambda self: self.texture_quantizer.bits_per_token)
    codebooks = property(lambda self: self.texture_quantizer.codebooks)

    def forward(self, x, mask=None):
        return self.texture_quantizer(x, self.structure(x.shape, x), mask)

    def encode(self, x, mask=None):
        return self.texture_quantizer.encode(x, self.structure(x.shape, x), mask)

    def decode(self, indices, dtype=torch.float32):
        inner = self.texture_quantizer.quantizer.decode(indices).to(dtype)
        return self.texture_quantizer.decode(indices, self.structure(inner.shape, inner))

    def before_quantization(self, x):
        """What comes out if the codes hit exactly."""
        structure = self.structure(x.shape, x)
        return structure + self.texture_quantizer.fuse(structure, x)

    def structure(self, shape, like):
        """The same quarters for every token: exact in every dtype."""
        quarters = (torch.arange(shape[feature_axis(self)], device=like.device) % 3).to(like.dtype)
        quarters = quarters / 4
        if feature_axis(self) == 1:
            quarters = quarters.reshape(-1, *[1] * (len(shape) - 2))
        return quarters.expand(shape)


class Mix(nn.Module):
    """A fuse module that learns."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, structure, texture):
        return self.gain * texture - self.share * structure


def vq(k=16, d=DIM, **options):
    return VectorQuantizer(d, k, **options)


def taken_over(quantizer):
    """The codebook belongs to a rule: no gradient, no codebook term."""
    CodebookEMA(quantizer)
    return quantizer


def self_updating(quantizer):
    ema, revival = CodebookEMA(quantizer, decay=0.9), CodebookRevival(quantizer, patience=2.0)
    return SelfUpdating(quantizer, ema, revival)


def textured(quantizer, **options):
    return GivenStructure(TextureQuantizer(quantizer, **options))


QUANTIZERS = {
    "euclidean": lambda: vq(),
    "cosine": lambda: vq(metric="cosine"),
    "dot": lambda: vq(metric="dot"),
    "taken-over": lambda: taken_over(vq()),
    "one-code": lambda: vq(k=1),
    "one-feature": lambda: vq(d=1),
    "one-of-each": lambda: vq(k=1, d=1),
    "unweighted": lambda: vq(commitment_weight=0.0, codebook_weight=0.0),
    "own-table": lambda: vq(codebook=Table(16, DIM, init=nn.init.uniform_)),
    "channel-first": lambda: ChannelFirst(vq()),
    "self-updating": lambda: self_updating(vq()),
    "channel-first-self-updating": lambda: ChannelFirst(self_updating(vq())),
    "texture": lambda: textured(vq()),
    "texture-fuse": lambda: textured(vq(), fuse=Mix()),
    "texture-channel-first": lambda: textured(ChannelFirst(vq()), fuse=Mix()),
}
RULES = {
    "ema": lambda quantizer: CodebookEMA(quantizer, decay=0.9),
    "revival": lambda quantizer: CodebookRevival(quantizer, patience=2.0),
}


every_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS.keys())
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def quantizers_where(applies):
    """The quantizers that a law applies to: a law that cannot apply is not a skipped test."""
    chosen = {name: make for name, make in QUANTIZERS.items() if applies(make())}
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen.keys())


# Some quantizers have no codebook that learns, some have several.
every_learned_quantizer = quantizers_where(lambda quantizer: quantizer.codebooks)
every_quantizer_of_one_codebook = quantizers_where(lambda quantizer: len(quantizer.codebooks) == 1)


def has(quantizer, kind):
    return any(isinstance(module, kind) for module in quantizer.modules())


def is_pure(quantizer):
    """``SelfUpdating`` in training is the declared exception to purity."""
    return not (quantizer.training and has(quantizer, SelfUpdating))


def feature_axis(quantizer):
    return 1 if has(quantizer, ChannelFirst) else -1


def draw(quantizer, leading=(32,), *, dtype=torch.float32, device="cpu", scale=2.0, seed=0):
    """Random input in the quantizer's layout, drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(*leading, quantizer.dim, generator=generator)
    return arrange(quantizer, x.to(device, dtype))


def arrange(quantizer, features_last):
    return features_last.movedim(-1, feature_axis(quantizer))


def features_last(quantizer, x):
    return x.movedim(feature_axis(quantizer), -1)


def decode(quantizer, indices, dtype):
    """Decodes for a user of ``dtype``, who holds the structure in it."""
    if isinstance(quantizer, GivenStructure):
        return quantizer.decode(indices, dtype)
    return quantizer.decode(indices).to(dtype)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
