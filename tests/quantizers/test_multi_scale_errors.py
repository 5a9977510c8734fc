"""What `MultiScaleQuantizer` refuses, beyond what every quantizer does."""

import re

import pytest
import torch

from tests.contracts.factories import vq
from vqprior import FSQ, MultiScaleQuantizer, RequireFinite, ResidualQuantizer
from vqprior.nn import ScaleRefinement

SCALES = (
    "`scales` must hold sizes of 1 to 3 dimensions that never decrease, got {}. Pass sizes "
    "such as (1, 2, 4)."
)


@pytest.mark.parametrize(
    ("scales", "options", "message"),
    [
        ([], {}, SCALES.format("[]")),
        ([2, (3,)], {}, SCALES.format("[2, (3,)]")),
        ([(1, 1, 1, 1)], {}, SCALES.format("[(1, 1, 1, 1)]")),
        ([()], {}, SCALES.format("[()]")),
        ([0, 2], {}, SCALES.format("[0, 2]")),
        ([2, 1], {}, SCALES.format("[2, 1]")),
        ([(1, 3), (2, 2)], {}, SCALES.format("[(1, 3), (2, 2)]")),
        ([1], {"commitment_weight": -1.0}, "`commitment_weight` must be at least 0.0, got -1.0."),
        ([1], {"codebook_weight": -1.0}, "`codebook_weight` must be at least 0.0, got -1.0."),
        (
            [1],
            {"refine": ScaleRefinement(4)},
            "`codebook_weight` must be greater than 0 for `refine` to learn, got 0.0. Freeze "
            "`refine`, or pass a positive weight.",
        ),
    ],
)
def test_wrong_arguments(scales, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MultiScaleQuantizer(vq(), scales, **options)


def test_a_frozen_refine_needs_no_weight():
    frozen = ScaleRefinement(4).requires_grad_(requires_grad=False)
    assert MultiScaleQuantizer(vq(), (1, 2), refine=frozen)(torch.randn(2, 2, 4)).loss > 0


@pytest.mark.parametrize("wrap", [lambda q: q, RequireFinite])
def test_scales_of_scales(wrap):
    inner = wrap(MultiScaleQuantizer(vq(), (1, 2)))
    message = (
        rf"^`quantizer` must have indices for each token, got {type(inner).__name__}\. Wrap "
        r"the outer quantizer in `MultiScaleQuantizer` instead\.$"
    )
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(inner, (1, 2))


CALLS = {
    "forward": lambda q, x: q(x),
    "encode": lambda q, x: q.encode(x),
    "logits": lambda q, x: q.logits(x),
    "quantize_as": lambda q, x: q.quantize_as(x, torch.zeros(2, 5, dtype=torch.int64)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (2, 4, 2, 2), (2, 4), (), (2, 2, 2, 5)])
def test_maps_of_another_size(call, shape):
    message = (
        f"`x` must have shape (..., 2, 2, 4), got {shape}. The last scale is the size of the map, "
        "and features come last: for feature maps (b, d, *spatial), wrap the quantizer in "
        "`ChannelsFirst`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(MultiScaleQuantizer(vq(), (1, 2)), torch.zeros(shape))


@pytest.mark.parametrize("make", [vq, lambda: ResidualQuantizer([vq(), vq()])], ids=["one", "two"])
@pytest.mark.parametrize("call", ["decode", "quantize_as", "logits"])
def test_wrong_indices(make, call):
    quantizer, x = MultiScaleQuantizer(make(), (1, 2)), torch.zeros(2, 2, 4)
    calls = {
        "decode": quantizer.decode,
        "quantize_as": lambda indices: quantizer.quantize_as(x, indices),
        "logits": lambda indices: quantizer.logits(x, indices=indices),
    }
    tail = "5" if quantizer.num_codebooks == 1 else "5, 2"
    message = (
        f"`indices` must have shape (..., {tail}), the positions of all scales, got (4,). Use -1 "
        "for unknown indices."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        calls[call](torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        TypeError, match=r"^`indices` must be an integer tensor, got torch\.float32"
    ):
        calls[call](torch.zeros(5))


def test_a_batch_of_indices_of_another_size():
    quantizer = MultiScaleQuantizer(vq(), (1, 2))
    x, indices = torch.zeros(3, 2, 2, 4), torch.zeros(2, 5, dtype=torch.int64)
    for call in (quantizer.quantize_as, lambda x, indices: quantizer.logits(x, indices=indices)):
        with pytest.raises(
            ValueError, match=r"^`indices` must have shape \(3, 5\), got \(2, 5\)\.$"
        ):
            call(x, indices)


def test_a_refine_of_another_shape():
    message = r"^`refine\(codes, position\)` must have shape \(1, 2, 2, 4\), got \(1, 2, 2, 3\)\.$"
    with pytest.raises(ValueError, match=message):
        MultiScaleQuantizer(vq(), (1, 2), refine=lambda codes, position: codes[..., :3])(
            torch.ones(2, 2, 4)
        )


def test_what_the_quantizer_cannot_do():
    x = torch.zeros(2, 2, 4)
    with pytest.raises(TypeError, match=r"explicit codebook for `logits`, got FSQ\."):
        MultiScaleQuantizer(FSQ([3] * 4), (1, 2)).logits(x)
    with pytest.raises(
        TypeError, match=r"explicit codebook for `nearest_indices`, got MultiScaleQuantizer\."
    ):
        MultiScaleQuantizer(vq(), (1, 2)).nearest_indices(x, 2)
    with pytest.raises(ValueError, match=r"^`temperature` must be greater than 0, got 0\.0\.$"):
        MultiScaleQuantizer(vq(), (1, 2)).logits(x, temperature=0.0)
