"""The quantizers that the claims are checked on: at least one of every class and layout."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.contracts.factories import (
    DIM,
    Mix,
    arrange,
    draw,
    features_last,
    has,
    projected,
    self_updating,
    simvq,
    textured,
    vq,
)
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
    TransformedCodebook,
)
from vqprior.functional import IndexBackpropagation, rotation_trick
from vqprior.nn import L2Norm

MAP = (3, 4, 4)  # leading dimensions: three maps


def normalized():
    return vq(metric="cosine", codebook=NormalizedCodebook(EmbeddingCodebook(16, DIM)))


def residual(**options):
    return ResidualQuantizer([vq() for _ in range(3)], **options)


def multi_scale(quantizer=None, **options):
    return MultiScaleQuantizer(
        vq() if quantizer is None else quantizer, scales=(1, 2, 4), **options
    )


QUANTIZERS = {
    "euclidean": lambda: vq(),
    "cosine": lambda: vq(metric="cosine"),
    "dot": lambda: vq(metric="dot"),
    "normalized": normalized,
    "unit-vectors": lambda: ProjectedQuantizer(normalized(), L2Norm(), nn.Identity()),
    "transformed": simvq,
    "rotation": lambda: vq(estimator=rotation_trick),
    "index-backpropagation": lambda: vq(estimator=IndexBackpropagation()),
    "residual": residual,
    "residual-shared": lambda: ResidualQuantizer([vq()] * 3),
    "residual-beam": lambda: residual(beam_size=3),
    "residual-dropout": lambda: residual(dropout=0.5),
    "residual-projected": lambda: ResidualQuantizer([projected(vq(d=2)) for _ in range(2)]),
    "grouped": lambda: GroupedQuantizer([vq(d=1), vq(d=3)]),
    "grouped-shared": lambda: GroupedQuantizer([vq(d=2)] * 2),
    "multi-scale": lambda: multi_scale(),
    "multi-scale-grouped": lambda: multi_scale(GroupedQuantizer([vq(d=2), vq(d=2)])),
    "multi-scale-projected": lambda: multi_scale(projected(vq(d=2)), codebook_weight=1.0),
    "projected": lambda: projected(vq(d=2)),
    "projected-fsq": lambda: projected(FSQ([4, 5, 3])),
    "fsq": lambda: FSQ([8, 5, 3, 7]),
    "lfq": lambda: LFQ(DIM),
    "bsq": lambda: BSQ(DIM, commitment_weight=0.25),
    "random-projection": lambda: RandomProjectionQuantizer(DIM, 16, code_dim=3),
    "texture": lambda: textured(vq()),
    "texture-residual-map": lambda: textured(ChannelsFirst(residual()), fuse=Mix()),
    "channel-first": lambda: ChannelsFirst(vq()),
    "channel-first-residual": lambda: ChannelsFirst(residual()),
    "channel-first-grouped": lambda: ChannelsFirst(GroupedQuantizer([vq(d=2), vq(d=2)])),
    "channel-first-multi-scale": lambda: ChannelsFirst(multi_scale()),
    "channel-first-projected": lambda: ChannelsFirst(projected(vq(d=2))),
    "channel-first-lfq": lambda: ChannelsFirst(LFQ(DIM)),
    "require-finite": lambda: RequireFinite(residual()),
    "self-updating": lambda: self_updating(vq()),
    "self-updating-residual": lambda: self_updating(ResidualQuantizer([vq()] * 3)),
}
RULES = {
    "ema": partial(CodebookEMA, decay=0.5),
    "revival": partial(CodebookRevival, patience=1.0, threshold=0.5),
}


def quantizers_where(*conditions):
    chosen = {
        name: make
        for name, make in QUANTIZERS.items()
        if all(condition(make()) for condition in conditions)
    }
    assert chosen
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen.keys())


def rules_can_write(quantizer):
    return bool(quantizer.codebooks) and not has(quantizer, TransformedCodebook)


def has_codes_to_score(quantizer):
    return bool(quantizer.codebooks)


def is_pure(quantizer):
    return not has(quantizer, SelfUpdating)


def skips_what_is_not_finite(quantizer):
    return not has(quantizer, RequireFinite)


every_quantizer = quantizers_where()
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def seeded(make):
    """Two of them are alike."""
    torch.manual_seed(3)
    return make()


def maps(quantizer, seed=0, count=MAP[0], **options):
    return draw(quantizer, (count, *MAP[1:]), seed=seed, **options)


def some_tokens(seed=7):
    """A mask of about two thirds of the tokens of ``maps``."""
    return torch.rand(MAP, generator=torch.Generator().manual_seed(seed)) > 0.3


def filled(quantizer, x, mask, value):
    """``x`` with ``value`` in place of the tokens that are masked."""
    last = features_last(quantizer, x).clone()
    last[~mask] = value
    return arrange(quantizer, last)


def gradients(quantizer, x, losses):
    """Of what ``losses(x)`` adds up to: with respect to ``x`` and every parameter."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    losses(x).backward()
    found = {name: p.grad for name, p in quantizer.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}
