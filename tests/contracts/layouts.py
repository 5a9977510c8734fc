"""Input layouts of the quantizers in `factories`: features, tokens and spatial dimensions."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import (
    BSQ,
    FSQ,
    ChannelsFirst,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    Quantizer,
    RequireFinite,
    SelfUpdating,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def has(quantizer, kind):
    return any(isinstance(module, kind) for module in quantizer.modules())


def feature_axis(quantizer):
    return 1 if has(quantizer, ChannelsFirst) else -1


def map_size(quantizer):
    """The spatial size that a multi-scale quantizer takes; () for all others."""
    scales = [m.scales for m in quantizer.modules() if isinstance(m, MultiScaleQuantizer)]
    return scales[0][-1] if scales else ()


def is_of_tokens(quantizer):
    """Whether each token has its own indices, independent of the other tokens."""
    return not map_size(quantizer)


def tokens(quantizer, leading=(32,)):
    """The shape of the tokens of ``draw``, and of a mask."""
    return (*leading, *map_size(quantizer))


def draw(quantizer, leading=(32,), *, dtype=torch.float32, device="cpu", scale=2.0, seed=0):
    """Random input in the quantizer's layout, drawn on the CPU to be equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(*tokens(quantizer, leading), quantizer.dim, generator=generator)
    return arrange(quantizer, x.to(device, dtype))


def draw_mask(quantizer, leading=(32,), *, seed=7):
    """True for about 70 % of the tokens; every third map is masked as a whole."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens(quantizer, leading), generator=generator) > 0.3
    if map_size(quantizer):
        mask[1::3] = False
    return mask


def arrange(quantizer, features_last):
    return features_last.movedim(-1, feature_axis(quantizer))


def features_last(quantizer, x):
    return x.movedim(feature_axis(quantizer), -1)


def fill(quantizer, x, where, value):
    """``x`` with ``value`` in the tokens of ``where``."""
    x = features_last(quantizer, x).clone()
    x[where] = value
    return arrange(quantizer, x)


def decode(quantizer, indices, dtype):
    """Decodes to ``dtype``, with the structure in this dtype too."""
    if isinstance(quantizer, GivenStructure):
        return quantizer.decode(indices, dtype)
    return quantizer.decode(indices).to(dtype)


class GivenStructure(Quantizer):
    """Makes a ``TextureQuantizer`` a ``Quantizer`` by a fixed structure."""

    def __init__(self, texture_quantizer):
        super().__init__()
        self.texture_quantizer = texture_quantizer

    dim = property(lambda self: self.texture_quantizer.dim)
    codebook_sizes = property(lambda self: self.texture_quantizer.codebook_sizes)
    codebooks = property(lambda self: self.texture_quantizer.codebooks)
    bits_per_token = property(lambda self: self.texture_quantizer.bits_per_token)

    def forward(self, x, mask=None):
        return self.texture_quantizer(x, self.structure(x.shape, x), mask)

    def encode(self, x, mask=None):
        return self.texture_quantizer.encode(x, self.structure(x.shape, x), mask)

    def decode(self, indices, dtype=None):
        inner = self.texture_quantizer.quantizer.decode(indices).to(dtype or self.dtype)
        return self.texture_quantizer.decode(indices, self.structure(inner.shape, inner))

    def quantize_as(self, x, indices):
        return self.texture_quantizer.quantize_as(x, self.structure(x.shape, x), indices)

    def logits(self, x, *, temperature=1.0, indices=None):
        return self.texture_quantizer.logits(
            x, self.structure(x.shape, x), temperature=temperature, indices=indices
        )

    def structure(self, shape, like):
        """A structure of quarters, equal for every token and exact in every dtype."""
        quarters = (torch.arange(shape[feature_axis(self)], device=like.device) % 3).to(like.dtype)
        quarters = quarters / 4
        if feature_axis(self) == 1:
            quarters = quarters.reshape(-1, *[1] * (len(shape) - 2))
        return quarters.expand(shape)


def before_quantization(quantizer, x):
    """The result if every code equaled its input; the straight-through gradient is that of this."""
    if isinstance(quantizer, GivenStructure):
        texture, structure = quantizer.texture_quantizer, quantizer.structure(x.shape, x)
        return structure + before_quantization(texture.quantizer, texture.fuse(structure, x))
    if isinstance(quantizer, ChannelsFirst):
        return before_quantization(quantizer.quantizer, x.movedim(1, -1)).movedim(-1, 1)
    if isinstance(quantizer, (SelfUpdating, RequireFinite)):
        return before_quantization(quantizer.quantizer, x)
    if isinstance(quantizer, ProjectedQuantizer):
        return quantizer.up(before_quantization(quantizer.quantizer, quantizer.down(x)))
    if isinstance(quantizer, GroupedQuantizer):
        parts = x.split([group.dim for group in quantizer.groups], dim=-1)
        pairs = zip(quantizer.groups, parts, strict=True)
        return torch.cat([before_quantization(group, part) for group, part in pairs], dim=-1)
    if isinstance(quantizer, BSQ):
        return F.normalize(x, dim=-1)
    if isinstance(quantizer, FSQ):
        return bounded(x, quantizer.levels, symmetric=quantizer.symmetric)
    return x


def bounded(x, levels, *, symmetric):
    """The bounded features of FSQ: equation 1 and appendix of the paper, or the symmetric form."""
    if symmetric:
        return x.tanh()
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return ((x + (offset / half).atanh()).tanh() * half - offset) / (levels // 2)
