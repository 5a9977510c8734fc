"""`RandomProjectionQuantizer`: nearest directions, the way back, and nothing that learns."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import CodebookEMA, RandomProjectionQuantizer


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def seeded(seed=0, dim=6, k=32, **options):
    return RandomProjectionQuantizer(
        dim, k, generator=torch.Generator().manual_seed(seed), **options
    )


def test_finds_the_nearest_direction():
    quantizer, x = seeded(code_dim=3), torch.randn(200, 6)
    projected = x.double() @ quantizer.projection.double()
    expected = [
        max(range(32), key=lambda j: float(F.cosine_similarity(row, code[j], dim=0)))
        for row, code in zip(projected, [quantizer.codes.double()] * 200, strict=True)
    ]
    out = quantizer(x)
    assert out.indices.tolist() == expected
    exactly(quantizer.encode(x), out.indices)
    assert (out.loss, out.terms, out.selections, quantizer.codebooks) == (0, {}, (), ())


def test_length_does_not_matter_up_to_the_ends_of_the_range():
    quantizer, x = seeded(code_dim=4), torch.randn(100, 6).clamp(-3, 3)
    for scale in (2.0**-120, 2.0**60, 2.0**126):
        exactly(quantizer.encode(scale * x), quantizer.encode(x))
    assert quantizer.encode(torch.zeros(6)).item() == 0  # every direction is as near


@pytest.mark.parametrize("code_dim", [1, 3, 6])
def test_what_is_decoded_projects_onto_the_code_and_is_the_shortest_such(code_dim):
    quantizer = seeded(code_dim=code_dim)
    indices = torch.arange(32)
    vectors = quantizer.decode(indices)
    # The condition of a random projection magnifies the rounding.
    assert_close(vectors @ quantizer.projection, quantizer.codes, rtol=1e-3, atol=1e-4)
    expected = torch.linalg.lstsq(quantizer.projection.double().T, quantizer.codes.double().T)
    assert_close(vectors.double(), expected.solution.T, rtol=1e-3, atol=1e-4)
    if code_dim > 1:  # in one dimension, codes are 1 and -1
        exactly(quantizer.encode(vectors), indices)


def test_the_generator_decides_everything():
    first, second, third = seeded(1, code_dim=3), seeded(1, code_dim=3), seeded(2, code_dim=3)
    exactly(first.state_dict(), second.state_dict())
    assert (first.codes != third.codes).any()
    assert (first.projection != third.projection).any()
    rng = torch.get_rng_state()
    seeded(code_dim=3)
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_distributions_are_those_of_the_paper():
    quantizer = RandomProjectionQuantizer(80, 2000, code_dim=16)
    bound = (6 / 96) ** 0.5
    assert quantizer.projection.abs().max() <= bound
    n = quantizer.projection.numel()
    # A uniform distribution has a variance of a third of the squared bound, its square of 4/45.
    assert abs(quantizer.projection.mean()) < 4 * bound / (3 * n) ** 0.5
    error = quantizer.projection.square().mean() - bound**2 / 3
    assert abs(error) < 4 * bound**2 * (4 / 45 / n) ** 0.5
    assert_close(quantizer.codes.norm(dim=1), torch.ones(2000))
    assert quantizer.codes.mean(dim=0).abs().max() < 5 / (16 * 2000) ** 0.5  # 5 sigma, 16 of them


def test_nothing_learns_and_the_state_travels():
    quantizer = seeded(code_dim=3)
    assert not list(quantizer.parameters())
    assert sorted(quantizer.state_dict()) == ["back", "codes", "projection"]
    other = RandomProjectionQuantizer(6, 32, code_dim=3)
    other.load_state_dict(quantizer.state_dict())
    x = torch.randn(50, 6)
    exactly(other(x).quantized, quantizer(x).quantized)
    with pytest.raises(ValueError, match=r"must have a codebook that can learn, got RandomProj"):
        CodebookEMA(quantizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_buffers_stay_float32_and_labels_stay_the_same(dtype):
    quantizer = seeded(code_dim=3)
    model = nn.Sequential(quantizer).to(dtype)
    assert {buffer.dtype for buffer in quantizer.buffers()} == {torch.float32}
    exactly(quantizer.state_dict(), seeded(code_dim=3).state_dict())
    x = torch.randn(100, 6).to(dtype)
    exactly(model[0].encode(x), seeded(code_dim=3).encode(x.float()))
    assert model[0](x).quantized.dtype == dtype
    expected = seeded(code_dim=3).decode(torch.arange(32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exactly(quantizer.encode(x), seeded(code_dim=3).encode(x.float()))
        exactly(quantizer.decode(torch.arange(32)), expected.to(dtype))
        exactly(seeded(code_dim=3).decode(torch.arange(32)), expected)  # built inside


def test_the_gradient_is_the_identity_where_a_token_counts():
    quantizer = seeded(code_dim=3)
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    mask = torch.tensor([True, True, False, True, True])
    out = quantizer(x, mask)
    exactly(torch.autograd.grad((weight * out.quantized).sum(), x)[0], weight * mask[:, None])
    again = quantizer.quantize_as(x, out.indices)
    exactly(again.quantized, out.quantized)
    exactly(again.indices, out.indices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 1), "`dim` must be at least 1, got 0."),
        ((4, 0, 1), "`codebook_size` must be at least 1, got 0."),
        ((4, 8, 0), "`code_dim` must be at least 1, got 0."),
        ((4, 8, 16), "`code_dim` must be at most `dim`, 4, got 16."),
    ],
)
def test_wrong_arguments(arguments, message):
    dim, k, code_dim = arguments
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RandomProjectionQuantizer(dim, k, code_dim=code_dim)


def test_repr_shows_sizes():
    assert repr(seeded(code_dim=3)) == "RandomProjectionQuantizer(6, 32, code_dim=3)"
