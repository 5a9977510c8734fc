"""`initialize_codebooks_` sets codes from the vectors that reach a codebook and nothing else."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vqprior import (
    ChannelsFirst,
    CodebookEMA,
    SelfUpdating,
    TextureQuantizer,
    VectorQuantizer,
    initialize_codebooks_,
)
from vqprior.functional import kmeans


def seeded():
    return torch.Generator().manual_seed(4)


def test_kmeans_of_what_the_quantizer_sees():
    quantizer, x = VectorQuantizer(3, 5), 100 + torch.randn(200, 3)
    initialize_codebooks_(quantizer, x, generator=seeded())
    expected = kmeans(x, 5, generator=seeded())
    assert_close(quantizer.codebook.codes().detach(), expected, rtol=0, atol=0)
    assert quantizer.codebook.weight.requires_grad


def test_sample_takes_distinct_vectors():
    quantizer, x = VectorQuantizer(3, 50), torch.randn(50, 3)
    initialize_codebooks_(quantizer, x, method="sample")
    codes = quantizer.codebook.codes().detach()
    assert_close(codes.unique(dim=0), x.unique(dim=0), rtol=0, atol=0)


def test_it_brings_every_code_into_use():
    quantizer, x = VectorQuantizer(8, 64), 1000 + torch.randn(2000, 8)
    assert quantizer(x).indices.unique().numel() < 8
    initialize_codebooks_(quantizer, x)
    assert quantizer(x).indices.unique().numel() == 64


@pytest.mark.parametrize("method", ["kmeans", "sample"])
def test_masked_and_non_finite_vectors_are_left_out(method):
    x, mask = torch.randn(40, 3), torch.arange(40) % 2 == 0
    expected, quantizer = VectorQuantizer(3, 6), VectorQuantizer(3, 6)
    initialize_codebooks_(
        expected, x[mask & (torch.arange(40) > 9)], method=method, generator=seeded()
    )
    x[~mask] = 1e6
    x[:10] = torch.nan
    for inputs, options in [((x, mask), {}), ((x,), {"mask": mask})]:
        initialize_codebooks_(quantizer, *inputs, method=method, generator=seeded(), **options)
        actual = quantizer.codebook.codes().detach()
        assert_close(actual, expected.codebook.codes().detach(), rtol=0, atol=0)


def test_it_reaches_through_wrappers():
    inner = VectorQuantizer(3, 5)
    quantizer = TextureQuantizer(ChannelsFirst(inner))
    texture, structure = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    initialize_codebooks_(quantizer, texture, structure, generator=seeded())
    expected = kmeans((texture - structure).movedim(1, -1), 5, generator=seeded())
    assert_close(inner.codebook.codes().detach(), expected)


def test_rules_are_not_stepped():
    inner = VectorQuantizer(3, 5)
    quantizer = SelfUpdating(inner, CodebookEMA(inner))
    initialize_codebooks_(quantizer, torch.randn(50, 3), generator=seeded())
    assert_close(quantizer.rules[0].counts_0, torch.ones(5), rtol=0, atol=0)
    assert quantizer.training


class Fails(nn.Module):
    def forward(self, structure, texture):
        raise RuntimeError("here")


@pytest.mark.parametrize("fuse", [None, Fails()])
def test_every_module_gets_its_mode_back(fuse):
    quantizer = TextureQuantizer(VectorQuantizer(3, 5), fuse=fuse).train()
    quantizer.quantizer.eval()
    x = torch.randn(20, 3)
    if fuse is None:
        initialize_codebooks_(quantizer, x, x)
    else:
        with pytest.raises(RuntimeError, match="here"):
            initialize_codebooks_(quantizer, x, x)
    assert quantizer.training
    assert not quantizer.quantizer.training
    assert not quantizer.quantizer.codebook.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_codes_keep_the_dtype_of_the_module(dtype):
    quantizer = VectorQuantizer(3, 5).to(dtype)
    initialize_codebooks_(quantizer, torch.randn(40, 3, dtype=dtype))
    assert quantizer.codebook.weight.dtype == dtype


def test_wrong_arguments():
    quantizer = VectorQuantizer(3, 5)
    with pytest.raises(ValueError, match=r"^`method` must be one of 'kmeans', 'sample', got 'pca'"):
        initialize_codebooks_(quantizer, torch.randn(9, 3), method="pca")
    with pytest.raises(
        ValueError, match=r"^`x` must hold at least one finite vector, got \(0, 3\)"
    ):
        initialize_codebooks_(quantizer, torch.full((9, 3), torch.nan))
