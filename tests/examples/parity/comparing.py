"""How close is close: the limits come from the noise of float32 in the authors' own code."""

import copy

import torch
from torch.testing import assert_close

# Absolute. Twice the noise (float32 against float64, and one thread against two), and less than
# the smallest mistake that was tried: LayerNorm with another epsilon moves these by 2.0e-4,
# 6.8e-5 and 8e-5.
IMAGE, STRUCTURE, LOGITS = 1.5e-4, 4e-5, 4e-5
GRADIENT = 1e-4  # of a tensor's largest value, or of its norm


def assert_near(actual, expected, limit):
    assert_close(actual.reshape(expected.shape).to(expected.dtype), expected, rtol=0, atol=limit)


def assert_near_its_size(actual, expected, limit):
    assert_near(actual, expected, limit * float(expected.abs().max()))


def by_official_name(module, to_official, value):
    """``value(parameter)`` of every parameter, under the names of the release."""
    holder = copy.deepcopy(module)
    with torch.no_grad():
        for target, source in zip(holder.parameters(), module.parameters(), strict=True):
            target.copy_(value(source))
    return to_official(holder)


def gradient(parameter):
    """The gradient, or not-a-number where there is none."""
    return torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad


def gradient_norms(module, to_official, names):
    """Norms of gradients in the order of ``names``; -1 for parameters that have none."""
    gradients = by_official_name(module, to_official, gradient)
    norms = torch.stack([gradients[name].norm() for name in names])
    return norms.float().nan_to_num(nan=-1.0)
