"""Choices that are no choices: refused by name when the quantizer is built."""

import re

import pytest
import torch
from torch import nn

from vqprior import (
    FSQ,
    EmbeddingCodebook,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    TransformedCodebook,
    VectorQuantizer,
)

VQ = VectorQuantizer(4, 16)
STRAIGHT = "For example `functional.straight_through`."
LIST = "Put it in a list."
MODULE = "Derive its class from `torch.nn.Module`."
CASES = [
    (
        lambda: VectorQuantizer(4, 16, estimator="rotation"),
        f"`estimator` must be callable, got str. {STRAIGHT}",
    ),
    (
        lambda: VectorQuantizer(4, 16, codebook=torch.zeros(16, 4)),
        "`codebook` must be a Codebook, got Tensor. For given vectors, pass "
        "`EmbeddingCodebook.from_codes(vectors)`.",
    ),
    (
        lambda: ResidualQuantizer([VQ], estimator=None),
        f"`estimator` must be callable, got NoneType. {STRAIGHT}",
    ),
    (
        lambda: ResidualQuantizer(VQ),
        "`quantizers` must be a sequence, got VectorQuantizer. Put it in a list.",
    ),
    (
        lambda: GroupedQuantizer(VQ),
        "`quantizers` must be a sequence, got VectorQuantizer. Put it in a list.",
    ),
    (
        lambda: ProjectedQuantizer(VQ, torch.relu, nn.Identity()),
        f"`down` must be a module, got builtin_function_or_method. {MODULE}",
    ),
    (
        lambda: ProjectedQuantizer(VQ, nn.Identity(), None),
        f"`up` must be a module, got NoneType. {MODULE}",
    ),
    (
        lambda: TransformedCodebook(EmbeddingCodebook(4, 2), torch.eye(2)),
        f"`module` must be a module, got Tensor. {MODULE}",
    ),
    (
        lambda: MultiScaleQuantizer(VQ, (1, 2), refine=0.5),
        "`refine` must be callable, got float. For example `nn.ScaleRefinement`.",
    ),
    (lambda: FSQ(8), "`levels` must be a sequence, got 8. For example `[8, 5, 5]`."),
]


@pytest.mark.parametrize(("build", "message"), CASES, ids=[m for _, m in CASES])
def test_a_choice_that_is_none(build, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        build()


def test_a_module_list_is_a_sequence():
    assert ResidualQuantizer(nn.ModuleList([VQ, VectorQuantizer(4, 8)])).codebook_sizes == (16, 8)
