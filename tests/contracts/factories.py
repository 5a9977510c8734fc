"""Every quantizer the laws are checked on. Adding a quantizer adds one line to QUANTIZERS."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    ChannelsFirst,
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    GroupedQuantizer,
    IndexEstimator,
    NormalizedCodebook,
    ProjectedQuantizer,
    Quantizer,
    RandomProjectionQuantizer,
    RequireFinite,
    ResidualQuantizer,
    SelfUpdating,
    TextureQuantizer,
    TransformedCodebook,
    VectorQuantizer,
)
from vqprior.functional import IndexBackpropagation, rotation_trick
from vqprior.nn import L2Norm

DIM = 4


class GivenStructure(Quantizer):
    """A ``TextureQuantizer`` whose structure is known, so that it is a ``Quantizer``."""

    def __init__(self, texture_quantizer):
        super().__init__()
        self.texture_quantizer = texture_quantizer

    dim = property(lambda self: self.texture_quantizer.dim)
    codebook_sizes = property(lambda self: self.texture_quantizer.codebook_sizes)
    codebooks = property(lambda self: self.texture_quantizer.codebooks)

    def forward(self, x, mask=None):
        return self.texture_quantizer(x, self.structure(x.shape, x), mask)

    def encode(self, x, mask=None):
        return self.texture_quantizer.encode(x, self.structure(x.shape, x), mask)

    def decode(self, indices, dtype=torch.float32):
        inner = self.texture_quantizer.quantizer.decode(indices).to(dtype)
        return self.texture_quantizer.decode(indices, self.structure(inner.shape, inner))

    def quantize_as(self, x, indices):
        return self.texture_quantizer.quantize_as(x, self.structure(x.shape, x), indices)

    def logits(self, x, *, temperature=1.0, indices=None):
        return self.texture_quantizer.logits(
            x, self.structure(x.shape, x), temperature=temperature, indices=indices
        )

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


def projected(quantizer, dim=DIM):
    return ProjectedQuantizer(
        quantizer, nn.Linear(dim, quantizer.dim), nn.Linear(quantizer.dim, dim)
    )


def spherical(**options):
    """Unit vectors against unit codes, as in ViT-VQGAN."""
    inner = vq(metric="cosine", codebook=NormalizedCodebook(EmbeddingCodebook(16, DIM)), **options)
    return ProjectedQuantizer(inner, L2Norm(), nn.Identity())


def simvq():
    return vq(
        codebook=TransformedCodebook(
            EmbeddingCodebook(16, DIM).requires_grad_(False), nn.Linear(DIM, DIM)
        )
    )


def residual(count=3, **options):
    return ResidualQuantizer([vq(k=16) for _ in range(count)], **options)


def shared_residual():
    return ResidualQuantizer([vq()] * 3)


def scaled_fsq(level):
    """A stage of residual FSQ: finer from stage to stage."""
    return ProjectedQuantizer(FSQ([5] * DIM, symmetric=True), Gain(4.0**level), Gain(4.0**-level))


class Gain(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * x


QUANTIZERS = {
    "euclidean": lambda: vq(),
    "cosine": lambda: vq(metric="cosine"),
    "dot": lambda: vq(metric="dot"),
    "taken-over": lambda: taken_over(vq()),
    "one-code": lambda: vq(k=1),
    "one-feature": lambda: vq(d=1),
    "one-of-each": lambda: vq(k=1, d=1),
    "unweighted": lambda: vq(commitment_weight=0.0, codebook_weight=0.0),
    "own-table": lambda: vq(codebook=EmbeddingCodebook(16, DIM, init=nn.init.uniform_)),
    "normalized": lambda: vq(
        metric="cosine", codebook=NormalizedCodebook(EmbeddingCodebook(16, DIM))
    ),
    "spherical": spherical,
    "simvq": simvq,
    "rotation": lambda: vq(estimator=rotation_trick),
    "rotation-bounded": lambda: vq(estimator=partial(rotation_trick, max_gain=1.0)),
    "ibq": lambda: vq(metric="dot", estimator=IndexBackpropagation()),
    "gumbel": lambda: vq(estimator=IndexBackpropagation("gumbel")),
    "reinmax": lambda: vq(metric="cosine", estimator=IndexBackpropagation("reinmax")),
    "fsq": lambda: FSQ([8, 5, 3, 7]),
    "fsq-symmetric": lambda: FSQ([8, 5, 2, 7], symmetric=True),
    "lfq": lambda: LFQ(DIM),
    "bsq": lambda: BSQ(DIM, commitment_weight=0.25),
    "random-projection": lambda: RandomProjectionQuantizer(DIM, 16, code_dim=3),
    "residual": residual,
    "residual-of-one": lambda: residual(1),
    "residual-shared": shared_residual,
    "residual-beam": lambda: residual(beam_size=3),
    "residual-dropout": lambda: residual(dropout=0.7),
    "residual-rotation": lambda: residual(estimator=rotation_trick),
    "residual-taken-over": lambda: taken_over(residual()),
    "residual-of-projected": lambda: ResidualQuantizer([projected(vq(d=2)) for _ in range(2)]),
    "residual-beam-of-projected": lambda: ResidualQuantizer(
        [projected(vq(d=2)) for _ in range(2)], beam_size=2
    ),
    "residual-fsq": lambda: ResidualQuantizer([scaled_fsq(level) for level in range(3)]),
    "residual-of-grouped": lambda: ResidualQuantizer([grouped(), vq(), LFQ(DIM)]),
    "grouped": lambda: grouped(),
    "grouped-of-one": lambda: GroupedQuantizer([vq()]),
    "grouped-shared": lambda: GroupedQuantizer([vq(d=2)] * 2),
    "grouped-mixed": lambda: GroupedQuantizer([vq(k=5, d=1), FSQ([3]), residual_of(2)]),
    "projected": lambda: projected(vq(d=2)),
    "projected-lfq": lambda: projected(LFQ(6)),
    "projected-residual": lambda: projected(ResidualQuantizer([vq(d=3), vq(d=3)])),
    "require-finite": lambda: RequireFinite(residual()),
    "channel-first": lambda: ChannelsFirst(vq()),
    "channel-first-residual": lambda: ChannelsFirst(residual()),
    "self-updating": lambda: self_updating(vq()),
    "self-updating-residual": lambda: self_updating(shared_residual()),
    "residual-of-self-updating": lambda: ResidualQuantizer(
        [self_updating(vq()), self_updating(vq())]
    ),
    "channel-first-self-updating": lambda: ChannelsFirst(self_updating(vq())),
    "texture": lambda: textured(vq()),
    "texture-fuse": lambda: textured(vq(), fuse=Mix()),
    "texture-channel-first": lambda: textured(ChannelsFirst(vq()), fuse=Mix()),
    "texture-residual": lambda: textured(ChannelsFirst(residual()), fuse=Mix()),
}


def grouped():
    return GroupedQuantizer([vq(d=2), vq(d=2)])


def residual_of(dim):
    return ResidualQuantizer([vq(d=dim), vq(d=dim, k=7)])


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


def has(quantizer, kind):
    return any(isinstance(module, kind) for module in quantizer.modules())


def learned_by_rules(quantizer):
    return bool(quantizer.codebooks) and not has(quantizer, TransformedCodebook)


def estimates_through_indices(quantizer):
    estimators = (getattr(module, "estimator", None) for module in quantizer.modules())
    return any(isinstance(estimator, IndexEstimator) for estimator in estimators)


def estimates_straight_through(quantizer):
    estimators = [getattr(module, "estimator", None) for module in quantizer.modules()]
    return all("straight" in getattr(e, "__name__", "") for e in estimators if e is not None)


def draws_in_training(quantizer):
    """Dropout and sampling, which training mode alone has."""
    options = [
        (getattr(m, "dropout", 0.0), getattr(getattr(m, "estimator", None), "estimator", ""))
        for m in quantizer.modules()
    ]
    return any(dropout > 0 or name in ("gumbel", "reinmax") for dropout, name in options)


def is_deterministic(quantizer):
    return not draws_in_training(quantizer)


def is_pure(quantizer):
    """``SelfUpdating`` in training is the declared exception to purity."""
    return not (quantizer.training and has(quantizer, SelfUpdating))


def waits_for_nothing(quantizer):
    """``RequireFinite`` reads a number back: the declared exception to law 6."""
    return not has(quantizer, RequireFinite)


def skips_what_is_not_finite(quantizer):
    return not has(quantizer, RequireFinite)


def before_quantization(quantizer, x):
    """What comes out if the codes hit exactly: the estimator's gradient is that of this."""
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
    """Equation 1 and the appendix of the FSQ paper, and the symmetric form."""
    if symmetric:
        return x.tanh()
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return ((x + (offset / half).atanh()).tanh() * half - offset) / (levels // 2)


def feature_axis(quantizer):
    return 1 if has(quantizer, ChannelsFirst) else -1


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


# Some quantizers have no codebook that a rule can set, some have several.
every_learned_quantizer = quantizers_where(learned_by_rules)
every_quantizer_of_one_codebook = quantizers_where(lambda q: len(q.codebooks) == 1)
every_quantizer_of_one_table = quantizers_where(
    lambda q: len(q.codebooks) == 1 and not has(q, TransformedCodebook)
)
