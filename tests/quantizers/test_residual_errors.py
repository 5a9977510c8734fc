"""`ResidualQuantizer`: wrong arguments and calls, and what they say."""

import re

import pytest
import torch
from torch import nn

from tests.quantizers.stages import plain
from vqprior import (
    FSQ,
    LFQ,
    ChannelsFirst,
    MultiScaleQuantizer,
    ResidualQuantizer,
    TextureQuantizer,
    VectorQuantizer,
)

vq, wide = VectorQuantizer(4, 16), VectorQuantizer(5, 16)


@pytest.mark.parametrize(
    ("quantizers", "options", "error", "message"),
    [
        ([], {}, ValueError, "`quantizers` must hold at least one quantizer, got none."),
        (
            [vq, wide],
            {},
            ValueError,
            "`quantizers` must have equal `dim`, got [4, 5]. Wrap stages of another `dim` in "
            "`ProjectedQuantizer`.",
        ),
        (
            [vq, nn.Linear(4, 4)],
            {},
            TypeError,
            "`quantizers[1]` must be a quantizer, got Linear. Only the outermost quantizer can be "
            "a `TextureQuantizer`.",
        ),
        (
            [TextureQuantizer(vq)],
            {},
            TypeError,
            "`quantizers[0]` must be a quantizer, got TextureQuantizer. Only the outermost "
            "quantizer can be a `TextureQuantizer`.",
        ),
        (
            [MultiScaleQuantizer(vq, (1, 2))],
            {},
            ValueError,
            "`quantizers[0]` must have indices for each token, got MultiScaleQuantizer. Wrap "
            "the outer quantizer in `MultiScaleQuantizer` instead.",
        ),
        (
            [ChannelsFirst(MultiScaleQuantizer(vq, (1, 2)))],
            {},
            ValueError,
            "`quantizers[0]` must have features last, got ChannelsFirst. Wrap the outer "
            "quantizer in `ChannelsFirst` instead.",
        ),
        ([vq], {"dropout": 1.1}, ValueError, "`dropout` must be in [0, 1], got 1.1."),
        ([vq], {"beam_size": 0}, ValueError, "`beam_size` must be at least 1, got 0."),
        (
            [vq, FSQ([3] * 4)],
            {"beam_size": 2},
            TypeError,
            "`quantizer` must have one explicit codebook for `nearest_indices`, got FSQ. Use a "
            "`VectorQuantizer` or a wrapper around one.",
        ),
    ],
)
def test_wrong_arguments(quantizers, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ResidualQuantizer(quantizers, **options)


@pytest.mark.parametrize("call", ["decode", "quantize_as", "logits"])
@pytest.mark.parametrize("shape", [(3, 5), (3,), ()])
def test_indices_of_another_number_of_codebooks(call, shape):
    residual, indices = plain(4), torch.zeros(shape, dtype=torch.int64)
    message = (
        f"`indices` must have shape (..., 4), one index per codebook, got {shape}. Use -1 for "
        "unknown indices."
    )
    calls = {
        "decode": lambda: residual.decode(indices),
        "quantize_as": lambda: residual.quantize_as(torch.zeros(3, 4), indices),
        "logits": lambda: residual.logits(torch.zeros(3, 4), indices=indices),
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        calls[call]()


def test_other_wrong_calls():
    residual = plain(2)
    with pytest.raises(ValueError, match=r"^`indices` must have shape \(3, 2\), got \(5, 2\)\.$"):
        residual.quantize_as(torch.zeros(3, 4), torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^`temperature` must be greater than 0, got 0\.0\.$"):
        residual.logits(torch.zeros(3, 4), temperature=0.0)
    with pytest.raises(ValueError, match=r"^`x` must have shape \(\.\.\., 4\), got \(3, 5\)\."):
        residual.logits(torch.zeros(3, 5))
    with pytest.raises(TypeError, match=r"^`x` must be a floating-point tensor, got torch\.int64"):
        residual.logits(torch.zeros(3, 4, dtype=torch.int64))
    message = (
        r"^`quantizer` must have one explicit codebook for `logits`, got LFQ\. Use a "
        r"`VectorQuantizer` or a wrapper around one\.$"
    )
    with pytest.raises(TypeError, match=message):
        ResidualQuantizer([vq, LFQ(4)]).logits(torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"codebook for `nearest_indices`, got ResidualQuantizer\."):
        residual.nearest_indices(torch.zeros(3, 4), 2)
