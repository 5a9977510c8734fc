import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vqprior import MultiScaleQuantizer, VectorQuantizer
from vqprior.nn import ScaleRefinement

# Worked out by hand: ticks at 1/12, 13/36, 23/36, 11/12 for four, evenly spaced for the rest.
# With ten scales, two of them lie halfway between ticks; this is what the released code chooses.
CHOICES = {
    (1, 2): [0, 0],
    (2, 3): [0, 0, 1],
    (3, 5): [0, 0, 1, 2, 2],
    (4, 4): [0, 1, 2, 3],
    (4, 10): [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
}


def tagged(dim, count, **options):
    """Convolutions that return their number everywhere."""
    refine = ScaleRefinement(dim, count, **options)
    for number, convolution in enumerate(refine.convolutions):
        nn.init.zeros_(convolution.weight)
        nn.init.constant_(convolution.bias, float(number))
    return refine


@pytest.mark.parametrize(("count", "scales"), CHOICES)
def test_the_nearest_tick_is_used(count, scales):
    refine = tagged(2, count, ratio=1.0)
    positions = [number / max(scales - 1, 1) for number in range(scales)]
    used = [int(refine(torch.zeros(1, 2, 2, 2), position)[0, 0, 0, 0]) for position in positions]
    assert used == CHOICES[count, scales]


def test_value_is_that_of_the_published_formula():
    torch.manual_seed(0)
    refine, codes = ScaleRefinement(3, 4, ratio=0.3), torch.randn(2, 4, 5, 3)
    convolution = refine.convolutions[2]
    maps = codes.permute(0, 3, 1, 2)
    expected = maps * (1 - 0.3) + convolution(maps) * 0.3
    torch.testing.assert_close(refine(codes, 0.6), expected.permute(0, 2, 3, 1))


def test_ratio_of_zero_changes_nothing():
    codes = torch.randn(2, 4, 5, 3)
    assert torch.equal(ScaleRefinement(3, ratio=0.0)(codes, 0.5), codes)


def test_gradient_reaches_codes_and_the_used_convolution_alone():
    refine, codes = ScaleRefinement(3, 2), torch.randn(1, 4, 4, 3, requires_grad=True)
    refine(codes, 1.0).square().sum().backward()
    assert codes.grad.abs().sum() > 0
    assert refine.convolutions[1].weight.grad.abs().sum() > 0
    assert refine.convolutions[0].weight.grad is None


@pytest.mark.parametrize("weights", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_codes_keep_their_dtype(dtype, weights):
    refine = ScaleRefinement(3).to(weights)
    codes = torch.randn(1, 4, 4, 3).to(dtype)
    refined = refine(codes, 0.0)
    assert refined.dtype == dtype
    wide = refine.double()(codes.double(), 0.0)
    torch.testing.assert_close(refined.double(), wide, rtol=2e-2, atol=2e-2)


def test_inside_multi_scale_each_scale_is_refined():
    torch.manual_seed(0)
    vq = VectorQuantizer(dim=3, codebook_size=8)
    refine = ScaleRefinement(3, 2)
    quantizer = MultiScaleQuantizer(vq, scales=(1, 2, 4), refine=refine, codebook_weight=1.0)
    indices = torch.randint(8, (2, 21))
    total = torch.zeros(2, 3, 4, 4)
    parts = zip(indices.split([1, 4, 16], dim=1), (1, 2, 4), (0, 0, 1), strict=True)
    for part, side, convolution in parts:
        maps = vq.decode(part).transpose(1, 2).reshape(2, 3, side, side)
        maps = maps if side == 4 else F.interpolate(maps, size=(4, 4), mode="bicubic")
        total = total + maps / 2 + refine.convolutions[convolution](maps) / 2
    torch.testing.assert_close(quantizer.decode(indices), total.permute(0, 2, 3, 1))
    out = quantizer(torch.randn(2, 4, 4, 3))
    out.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in refine.parameters())


def test_half_precision_inside_multi_scale():
    vq = VectorQuantizer(dim=3, codebook_size=8)
    refine = ScaleRefinement(3)
    quantizer = MultiScaleQuantizer(vq, scales=(1, 2), refine=refine, codebook_weight=1.0).half()
    out = quantizer(torch.randn(2, 2, 2, 3).half())
    assert out.quantized.dtype == torch.float16
    assert out.quantized.isfinite().all()


def test_codes_keep_their_dtype_under_autocast():
    refine, codes = ScaleRefinement(3), torch.randn(1, 4, 4, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = refine(codes, 0.4)
    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined, refine(codes, 0.4), rtol=2e-2, atol=2e-2)
    refined.sum().backward()
    assert codes.grad.isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_mixture_is_its_formula(ratio):
    refine, codes = ScaleRefinement(3, 1, ratio=ratio), torch.randn(2, 4, 5, 3)
    convolved = refine.convolutions[0](codes.movedim(-1, 1)).movedim(1, -1)
    expected = (1 - ratio) * codes + ratio * convolved
    torch.testing.assert_close(refine(codes, 0.5), expected)


def test_compiles_as_one_graph():
    refine, codes = ScaleRefinement(3), torch.randn(1, 4, 4, 3)
    compiled = torch.compile(refine, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(codes, 0.4), refine(codes, 0.4))


def test_extra_repr_shows_the_options():
    assert repr(ScaleRefinement(3, 2, ratio=0.25)).startswith(
        "ScaleRefinement(\n  3, 2, ratio=0.25"
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ScaleRefinement(0), ValueError, "`dim` must be at least 1, got 0."),
        (lambda: ScaleRefinement(3, 0), ValueError, "`num_refinements` must be at least 1, got 0."),
        (lambda: ScaleRefinement(3, ratio=2.0), ValueError, "`ratio` must be in [0, 1], got 2.0."),
        (
            lambda: ScaleRefinement(3)(torch.zeros(1, 3, 4, 4), 0.0),
            ValueError,
            "`codes` must have shape (b, h, w, 3), got (1, 3, 4, 4). Features come last, after "
            "two spatial dimensions.",
        ),
        (
            lambda: ScaleRefinement(3)(torch.zeros(1, 4, 3), 0.0),
            ValueError,
            "`codes` must have shape (b, h, w, 3), got (1, 4, 3). Features come last, after "
            "two spatial dimensions.",
        ),
        (
            lambda: ScaleRefinement(3)(torch.zeros(1, 4, 4, 3), 1.5),
            ValueError,
            "`position` must be in [0, 1], got 1.5.",
        ),
        (
            lambda: ScaleRefinement(3)(torch.zeros(1, 4, 4, 3, dtype=torch.long), 0.5),
            TypeError,
            "`codes` must be a floating-point tensor, got torch.int64.",
        ),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
