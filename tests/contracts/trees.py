"""Random quantizers of every class and nesting, described by trees of plain data.

Hypothesis can shrink and print a tree; ``build`` makes its quantizer.
"""

from functools import partial

import torch
from hypothesis import strategies as st
from torch import nn

from tests.contracts.factories import Mix, self_updating, textured
from tests.contracts.layouts import map_size
from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    ChannelsFirst,
    CodebookEMA,
    EmbeddingCodebook,
    GroupedQuantizer,
    MultiScaleQuantizer,
    NormalizedCodebook,
    ProjectedQuantizer,
    RandomProjectionQuantizer,
    ResidualQuantizer,
    TransformedCodebook,
    VectorQuantizer,
)
from vqprior.functional import IndexBackpropagation, rotation_trick, straight_through

ESTIMATORS = {
    "straight-through": straight_through,
    "rotation": rotation_trick,
    "rotation-bounded": partial(rotation_trick, max_gain=1.0),
    "ibq": IndexBackpropagation(temperature=4.0),
    "gumbel": IndexBackpropagation("gumbel", temperature=4.0),
    "reinmax": IndexBackpropagation("reinmax", temperature=4.0),
}
SCALES = ((1, 1), (2, 2), (2, 3), (4, 3))

codebook_kinds = st.sampled_from(["table", "normalized", "simvq", "taken-over"])
metrics = st.sampled_from(["euclidean", "cosine", "dot"])


def plain(dim):
    return st.tuples(
        st.just("vq"),
        st.just(dim),
        st.integers(1, 9),
        metrics,
        codebook_kinds,
        st.sampled_from(sorted(ESTIMATORS)),
    )


def leaves(dim):
    kinds = [
        plain(dim),
        st.tuples(st.just("lfq"), st.just(dim)),
        st.tuples(st.just("bsq"), st.just(dim)),
        st.booleans().flatmap(
            lambda symmetric: st.tuples(
                st.just("fsq"),
                st.lists(st.integers(2 if symmetric else 3, 6), min_size=dim, max_size=dim).map(
                    tuple
                ),
                st.just(symmetric),
            )
        ),
        st.tuples(st.just("random-projection"), st.just(dim), st.integers(1, dim)),
    ]
    # Plain quantizers twice, since they have the most options.
    return st.one_of(plain(dim), *kinds)


@st.composite
def has_index_per_token(draw, dim, depth):
    """Draws a quantizer that gives each token its own indices."""
    kind = draw(
        st.sampled_from(["leaf", "residual", "beam", "grouped", "projected", "self-updating"])
        if depth
        else st.just("leaf")
    )
    if kind == "residual":
        stages = draw(st.lists(has_index_per_token(dim, depth - 1), min_size=1, max_size=3))
        shared = draw(st.booleans())
        dropout = draw(st.sampled_from([0.0, 0.5]))
        return ("residual", tuple(stages[:1] * 3 if shared else stages), shared, dropout)
    if kind == "beam":
        stages = draw(st.lists(plain(dim), min_size=1, max_size=3))
        return ("beam", tuple(stages), draw(st.integers(2, 4)))
    if kind == "grouped":
        cuts = draw(st.integers(1, max(dim - 1, 1)))
        dims = [dim] if dim == 1 else [cuts, dim - cuts]
        return ("grouped", tuple(draw(has_index_per_token(part, depth - 1)) for part in dims))
    if kind == "projected":
        inner = draw(st.integers(1, 3))
        return ("projected", dim, draw(has_index_per_token(inner, depth - 1)))
    if kind == "self-updating":
        return ("self-updating", draw(has_index_per_token(dim, depth - 1)))
    return draw(leaves(dim))


@st.composite
def trees(draw, depth=2):
    """Draws a quantizer of tokens or maps, with features last or first."""
    dim = draw(st.integers(1, 4))
    tree = draw(has_index_per_token(dim, depth))
    if draw(st.booleans()):
        weights = st.sampled_from([0.0, 0.5])
        tree = ("multi-scale", tree, draw(weights), draw(weights))
    if draw(st.booleans()):
        tree = ("channel-first", tree)
    if draw(st.booleans()):
        tree = ("texture", tree, draw(st.booleans()))
    return tree


def build(tree):
    """Builds the quantizer of a tree; without rules if its codes cannot be set."""
    name, *rest = tree
    return BUILDERS[name](*rest)


def _plain(dim, k, metric, kind, estimator):
    codebook = EmbeddingCodebook(k, dim)
    if kind == "normalized":
        codebook = NormalizedCodebook(codebook)
    elif kind == "simvq":
        codebook = TransformedCodebook(codebook.requires_grad_(False), nn.Linear(dim, dim))
    quantizer = VectorQuantizer(
        dim, k, codebook=codebook, metric=metric, estimator=ESTIMATORS[estimator]
    )
    if kind == "taken-over":
        CodebookEMA(quantizer)
    return quantizer


def _residual(stages, shared, dropout):
    built = [build(stages[0])] * len(stages) if shared else [build(stage) for stage in stages]
    return ResidualQuantizer(built, dropout=dropout)


def _projected(dim, inner):
    quantizer = build(inner)
    return ProjectedQuantizer(
        quantizer, nn.Linear(dim, quantizer.dim), nn.Linear(quantizer.dim, dim)
    )


def _self_updating(inner):
    quantizer = build(inner)
    settable = not any(isinstance(module, TransformedCodebook) for module in quantizer.modules())
    return self_updating(quantizer) if quantizer.codebooks and settable else quantizer


BUILDERS = {
    "vq": _plain,
    "lfq": LFQ,
    "bsq": BSQ,
    "fsq": lambda levels, symmetric: FSQ(levels, symmetric=symmetric),
    "random-projection": lambda dim, code_dim: RandomProjectionQuantizer(dim, 7, code_dim=code_dim),
    "residual": _residual,
    "beam": lambda stages, beam: ResidualQuantizer([build(s) for s in stages], beam_size=beam),
    "grouped": lambda groups: GroupedQuantizer([build(group) for group in groups]),
    "projected": _projected,
    "self-updating": _self_updating,
    "multi-scale": lambda inner, commitment, codebook: MultiScaleQuantizer(
        build(inner), SCALES, commitment_weight=commitment, codebook_weight=codebook
    ),
    "channel-first": lambda inner: ChannelsFirst(build(inner)),
    "texture": lambda inner, learned: textured(
        build(inner), **({"fuse": Mix()} if learned else {})
    ),
}


def tokens_of(quantizer, batch):
    """The shape of the tokens: maps of a fixed size for a multi-scale quantizer."""
    return (batch, *(map_size(quantizer) or (3,)))


def random_mask(shape, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    share = {"some": 0.6, "all": 2.0, "nothing": -1.0}[kind]
    return torch.rand(shape, generator=generator) < share
