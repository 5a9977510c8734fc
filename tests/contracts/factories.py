"""The quantizers on which the laws are checked: add a line to QUANTIZERS for a new one."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.contracts.layouts import GivenStructure, has
from tests.contracts.traits import learned_by_rules
from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    ChannelsFirst,
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    GroupedQuantizer,
    MultiScaleQuantizer,
    NormalizedCodebook,
    ProjectedQuantizer,
    RandomProjectionQuantizer,
    RequireFinite,
    ResidualQuantizer,
    SelfUpdating,
    TextureQuantizer,
    TransformedCodebook,
    VectorQuantizer,
    default_rules,
)
from vqprior.functional import IndexBackpropagation, rotation_trick
from vqprior.nn import L2Norm, ScaleRefinement

DIM = 4


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
    """Builds a rule on `quantizer`, so the codebook has no gradient and no codebook term."""
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
    """Compares unit vectors with unit codes, as in ViT-VQGAN."""
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


def scaled_fsq(gain):
    """A stage of residual FSQ, whose scale shrinks from stage to stage."""
    return ProjectedQuantizer(FSQ([5] * DIM, symmetric=True), Gain(gain), Gain(1 / gain))


class Gain(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * x


def grouped():
    return GroupedQuantizer([vq(d=2), vq(d=2)])


def residual_of(dim):
    return ResidualQuantizer([vq(d=dim), vq(d=dim, k=7)])


def multi_scale(quantizer=None, scales=((1, 1), (2, 1), (2, 3), (4, 5)), **options):
    return MultiScaleQuantizer(vq() if quantizer is None else quantizer, scales, **options)


def refined(**options):
    return multi_scale(refine=ScaleRefinement(DIM, 2), codebook_weight=1.0, **options)


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
    "ibq": lambda: vq(  # the codes are the parameter itself
        codebook=EmbeddingCodebook(16, DIM), metric="dot", estimator=IndexBackpropagation()
    ),
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
    "residual-fsq": lambda: ResidualQuantizer([scaled_fsq(4.0**level) for level in range(3)]),
    "residual-of-grouped": lambda: ResidualQuantizer([grouped(), vq(), LFQ(DIM)]),
    "grouped": lambda: grouped(),
    "grouped-of-one": lambda: GroupedQuantizer([vq()]),
    "grouped-shared": lambda: GroupedQuantizer([vq(d=2)] * 2),
    "grouped-mixed": lambda: GroupedQuantizer([vq(k=5, d=1), FSQ([3]), residual_of(2)]),
    "projected": lambda: projected(vq(d=2)),
    "projected-fsq": lambda: scaled_fsq(3.0),  # whose projections have no parameters
    "projected-lfq": lambda: projected(LFQ(6)),
    "projected-residual": lambda: projected(ResidualQuantizer([vq(d=3), vq(d=3)])),
    "require-finite": lambda: RequireFinite(residual()),
    "channels-first": lambda: ChannelsFirst(vq()),
    "channels-first-residual": lambda: ChannelsFirst(residual()),
    "self-updating": lambda: self_updating(vq()),
    "self-updating-residual": lambda: self_updating(shared_residual()),
    "residual-of-self-updating": lambda: ResidualQuantizer(
        [self_updating(vq()), self_updating(vq())]
    ),
    "channels-first-self-updating": lambda: ChannelsFirst(self_updating(vq())),
    "texture": lambda: textured(vq()),
    "texture-fuse": lambda: textured(vq(), fuse=Mix()),
    "texture-channels-first": lambda: textured(ChannelsFirst(vq()), fuse=Mix()),
    "texture-residual": lambda: textured(ChannelsFirst(residual()), fuse=Mix()),
    "multi-scale": lambda: multi_scale(),
    "multi-scale-1d": lambda: multi_scale(scales=[(1,), (3,), (6,)]),
    "multi-scale-3d": lambda: multi_scale(scales=[(1, 1, 1), (2, 3, 2)]),
    "multi-scale-refine": lambda: refined(),
    "multi-scale-taken-over": lambda: taken_over(refined(commitment_weight=0.25)),
    "multi-scale-ibq": lambda: multi_scale(vq(metric="dot", estimator=IndexBackpropagation())),
    "multi-scale-residual": lambda: multi_scale(residual_of(DIM)),
    "multi-scale-grouped": lambda: multi_scale(GroupedQuantizer([vq(d=3), FSQ([4])])),
    "multi-scale-projected": lambda: multi_scale(projected(vq(d=2)), codebook_weight=1.0),
    "multi-scale-bsq": lambda: multi_scale(BSQ(DIM)),
    "multi-scale-self-updating": lambda: multi_scale(self_updating(vq())),
    "channels-first-multi-scale": lambda: ChannelsFirst(refined()),
    "texture-multi-scale": lambda: textured(ChannelsFirst(multi_scale()), fuse=Mix()),
}
# One of each class for the quick run; the others differ in options and nesting.
REPRESENTATIVE = {
    "euclidean",
    "fsq",
    "lfq",
    "bsq",
    "random-projection",
    "residual",
    "grouped",
    "multi-scale",
    "projected",
    "require-finite",
    "channels-first",
    "self-updating",
    "texture",
    "normalized",
    "simvq",
}


RULES = {
    "ema": lambda quantizer: CodebookEMA(quantizer, decay=0.9),
    "revival": lambda quantizer: CodebookRevival(quantizer, patience=2.0),
    "default": default_rules,
}


def _parametrized(quantizers):
    return pytest.mark.parametrize(
        "make",
        [
            pytest.param(make, id=name, marks=[] if name in REPRESENTATIVE else pytest.mark.full)
            for name, make in quantizers.items()
        ],
    )


def quantizers_where(*conditions):
    """Parametrizes by the quantizers that meet all conditions, instead of skipping the others."""
    return _parametrized(
        {name: make for name, make in QUANTIZERS.items() if all(c(make()) for c in conditions)}
    )


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


every_quantizer = _parametrized(QUANTIZERS)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
# Some quantizers have no codebook that a rule can set, some have several.
every_learned_quantizer = quantizers_where(learned_by_rules)
every_quantizer_of_one_codebook = quantizers_where(lambda q: len(q.codebooks) == 1)
every_quantizer_of_one_table = quantizers_where(
    lambda q: len(q.codebooks) == 1 and not has(q, TransformedCodebook)
)
