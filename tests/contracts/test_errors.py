"""Law 9: wrong input raises an error that names the argument, the requirement and the value."""

import itertools
import re
from functools import partial

import numpy as np
import pytest
import torch

from tests.contracts.factories import every_quantizer
from tests.contracts.layouts import GivenStructure, draw, feature_axis, map_size, tokens

pytestmark = every_quantizer
CALLS = ("forward", "encode")


def required_shape(quantizer):
    if feature_axis(quantizer) == 1:
        return f"(b, {quantizer.dim}, *spatial)"
    size = "".join(f"{length}, " for length in map_size(quantizer))
    return f"(..., {size}{quantizer.dim})"


def test_wrong_number_of_features(make):
    quantizer = make()
    for extra, call in itertools.product((1, 3), CALLS):
        bad = torch.zeros(2, quantizer.dim + extra)
        message = f"`x` must have shape {required_shape(quantizer)}, got {tuple(bad.shape)}."
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(quantizer, call)(bad)


def test_integer_input(make):
    quantizer = make()
    message = r"^`(x|texture)` must be a floating-point tensor, got torch\.int64\.$"
    for call in CALLS:
        with pytest.raises(TypeError, match=message):
            getattr(quantizer, call)(draw(quantizer).long())


def bare(quantizer):
    """Without the test's own wrapper, which would look at a shape first."""
    is_texture = isinstance(quantizer, GivenStructure)
    return quantizer.texture_quantizer.quantizer if is_texture else quantizer


@pytest.mark.parametrize("wrong", [None, [0], np.zeros(3)], ids=["None", "list", "numpy"])
def test_what_is_not_a_tensor(make, wrong):
    quantizer = bare(make())
    x = draw(quantizer)
    calls = [
        ("x", lambda: quantizer(wrong)),
        ("x", lambda: quantizer.encode(wrong)),
        ("x", lambda: quantizer.quantize_as(wrong, quantizer.encode(x))),
        ("indices", lambda: quantizer.quantize_as(x, wrong)),
        ("indices", lambda: quantizer.decode(wrong)),
    ]
    if wrong is not None:
        calls += [
            ("mask", lambda: quantizer(x, wrong)),
            ("mask", lambda: quantizer.encode(x, wrong)),
        ]
    for name, call in calls:
        message = rf"^`{name}` must be a tensor, got {type(wrong).__name__}\. Convert arrays and "
        with pytest.raises(TypeError, match=message):
            call()


def test_mask_that_is_not_boolean(make):
    quantizer = make()
    message = (
        r"^`mask` must be a boolean tensor, True for real tokens, got torch\.float32\. Convert it "
        r"with `mask != 0`\.$"
    )
    for call in CALLS:
        with pytest.raises(TypeError, match=message):
            getattr(quantizer, call)(draw(quantizer), torch.ones(tokens(quantizer)))


def test_mask_of_another_shape(make):
    quantizer = make()
    size, must = map_size(quantizer), re.escape(str(tokens(quantizer)))
    shapes = [(31, *size), (*tokens(quantizer), 1), (*tokens(quantizer), quantizer.dim)]
    for shape, call in itertools.product(shapes, CALLS):
        message = rf"^`mask` must have shape {must}, got {re.escape(str(shape))}\.$"
        with pytest.raises(ValueError, match=message):
            getattr(quantizer, call)(draw(quantizer), torch.ones(shape) > 0)


def test_indices_that_are_not_integers(make):
    quantizer = make()
    for dtype in (torch.float32, torch.bool, torch.complex64):
        message = rf"^`indices` must be an integer tensor, got {dtype}\.$"
        with pytest.raises(TypeError, match=message):
            quantizer.decode(torch.ones(3, dtype=dtype))


def test_indices_of_unsigned_dtypes(make):
    """In which torch computes hardly anything."""
    quantizer = make()
    x = draw(quantizer)
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        indices = torch.zeros_like(quantizer.encode(x)).to(dtype)
        message = (
            rf"^`indices` must be a signed or 8-bit integer tensor, got {dtype}\. Convert it with "
            r"`\.long\(\)`\.$"
        )
        for call in (quantizer.decode, partial(quantizer.quantize_as, x)):
            with pytest.raises(TypeError, match=message):
                call(indices)


def test_indices_that_name_no_code(make):
    quantizer = make()
    x = draw(quantizer)
    size = quantizer.codebook_sizes[-1]  # only of the last index: earlier codebooks may be smaller
    for bad in (size, -2):
        indices = quantizer.encode(x)
        indices[..., -1] = bad
        message = rf"^`indices` must be -1 or in \[0, {size}\), got {bad}\.$"
        with pytest.raises(ValueError, match=message):
            quantizer.decode(indices)
        with pytest.raises(ValueError, match=message):
            quantizer.quantize_as(x, indices)
