"""Residual quantizers that the tests of them share."""

import torch
from torch.testing import assert_close

from vqprior import (
    EmbeddingCodebook,
    ResidualQuantizer,
    VectorQuantizer,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def made_of(rows, **options):
    table = EmbeddingCodebook.from_codes(torch.tensor(rows))
    return VectorQuantizer(table.dim, table.num_codes, codebook=table, **options)


def plain(count, k=16, d=4, **options):
    return ResidualQuantizer([VectorQuantizer(d, k) for _ in range(count)], **options)
