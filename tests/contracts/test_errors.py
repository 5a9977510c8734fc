"""Law 9: wrong input raises, naming the argument, what it must be, and what arrived."""

import re

import pytest
import torch

from tests.contracts.factories import draw, every_quantizer, feature_axis

pytestmark = every_quantizer


def required_shape(quantizer):
    if feature_axis(quantizer) == 1:
        return f"(b, {quantizer.dim}, *spatial)"
    return f"(..., {quantizer.dim})"


@pytest.mark.parametrize("call", ["forward", "encode"])
@pytest.mark.parametrize("extra", [1, 3])
def test_wrong_number_of_features(make, call, extra):
    quantizer = make()
    bad = torch.zeros(2, quantizer.dim + extra)
    message = re.escape(f"`x` must have shape {required_shape(quantizer)}, got {tuple(bad.shape)}.")
    with pytest.raises(ValueError, match=message):
        getattr(quantizer, call)(bad)


@pytest.mark.parametrize("call", ["forward", "encode"])
def test_integer_input(make, call):
    quantizer = make()
    with pytest.raises(
        TypeError, match=r"^`(x|texture)` must be a floating-point tensor, got torch\.int64\.$"
    ):
        getattr(quantizer, call)(torch.zeros(2, quantizer.dim, dtype=torch.int64))


@pytest.mark.parametrize("call", ["forward", "encode"])
def test_mask_that_is_not_boolean(make, call):
    quantizer = make()
    message = (
        r"^`mask` must be a boolean tensor, True for real tokens, got torch\.float32\. Compare "
        r"with zero: `mask != 0`\.$"
    )
    with pytest.raises(TypeError, match=message):
        getattr(quantizer, call)(draw(quantizer), torch.ones(32))


@pytest.mark.parametrize("call", ["forward", "encode"])
def test_mask_of_another_shape(make, call):
    quantizer = make()
    for shape in [(31,), (32, 1), (32, quantizer.dim)]:
        message = rf"^`mask` must have shape \(32,\), got {re.escape(str(shape))}\.$"
        with pytest.raises(ValueError, match=message):
            getattr(quantizer, call)(draw(quantizer), torch.ones(shape) > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_indices_that_are_not_integers(make, dtype):
    quantizer = make()
    with pytest.raises(TypeError, match=rf"^`indices` must be an integer tensor, got {dtype}\.$"):
        quantizer.decode(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("call", ["decode", "assign"])
@pytest.mark.parametrize("wrong", ["too-high", "too-low"])
def test_indices_that_name_no_code(make, call, wrong):
    quantizer = make()
    x = draw(quantizer)
    indices = quantizer.encode(x)
    size = quantizer.codebook_sizes[-1]  # of the last index: those before may be smaller
    bad = size if wrong == "too-high" else -2
    indices[..., -1] = bad
    message = rf"^`indices` must be -1 or in \[0, {size}\), got {bad}\.$"
    with pytest.raises(ValueError, match=message):
        quantizer.decode(indices) if call == "decode" else quantizer.quantize_as(x, indices)
