"""Estimators: exact in value, correct in gradient."""

import functools
import re

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.observers import LargestTensor, NoHostSync
from vqprior.functional import rotation_trick, straight_through


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_straight_through_is_exact_in_value(low):
    """``x + (codes - x)`` would lose every digit of the codes here."""
    x, codes = (1e4 * torch.randn(1000)).to(low), (1e-3 * torch.randn(1000)).to(low)
    assert_close(straight_through(x, codes), codes, rtol=0, atol=0)


def test_straight_through_has_the_gradient_of_the_identity():
    x, codes = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    weight = torch.randn(5)
    (weight * straight_through(x, codes)).sum().backward()
    assert_close(x.grad, weight, rtol=0, atol=0)
    assert codes.grad is None


def test_straight_through_does_not_broadcast():
    with pytest.raises(ValueError, match=r"^`codes` must have shape \(3, 4\), got \(4,\)\.$"):
        straight_through(torch.zeros(3, 4), torch.zeros(4))


def rotation_by_definition(x, codes, max_gain=None):
    """The matrix ``J = gain * (I - 2 w w^T + 2 q u^T)`` of each vector, in float64."""
    x, codes = x.detach().double(), codes.detach().double()
    lengths = [t.norm(dim=-1, keepdim=True) for t in (x, codes)]
    u, q = x / lengths[0], codes / lengths[1]
    w = (u + q) / (u + q).norm(dim=-1, keepdim=True)
    identity = torch.eye(x.shape[-1], dtype=torch.float64)
    rotation = (
        identity - 2 * w.unsqueeze(-1) * w.unsqueeze(-2) + 2 * q.unsqueeze(-1) * u.unsqueeze(-2)
    )
    gain = lengths[1] / lengths[0]
    gain = gain if max_gain is None else gain.clamp_max(max_gain)
    return gain.unsqueeze(-1) * rotation


def rotated_gradient(x, codes, weight, max_gain=None):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        rotation_trick(x, codes, max_gain=max_gain), x, grad_outputs=weight
    )
    return gradient


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotation_is_exact_in_value(low):
    x, codes = (1e4 * torch.randn(100, 7)).to(low), (1e-3 * torch.randn(100, 7)).to(low)
    rotated = rotation_trick(x, codes)
    assert rotated.dtype == low
    assert_close(rotated, codes, rtol=0, atol=0)


@pytest.mark.parametrize("max_gain", [None, 0.5, 2.0])
@pytest.mark.parametrize("leading", [(), (50,), (2, 0, 3), (4, 5)])
def test_rotation_has_the_gradient_of_its_formula(leading, max_gain):
    x, codes, weight = (torch.randn(*leading, 6, dtype=torch.float64) for _ in range(3))
    matrix = rotation_by_definition(x, codes, max_gain)
    expected = (matrix.mT @ weight.unsqueeze(-1)).squeeze(-1)
    assert_close(rotated_gradient(x, codes, weight, max_gain), expected)


def test_rotation_maps_each_vector_to_its_code_and_keeps_angles():
    """What the matrix is for: it is checked here, so that the formula is not its own oracle."""
    x, codes, weight = (torch.randn(50, 6, dtype=torch.float64) for _ in range(3))
    matrix = rotation_by_definition(x, codes)
    assert_close((matrix @ x.unsqueeze(-1)).squeeze(-1), codes)
    gradient = rotated_gradient(x, codes, weight)
    gain = codes.norm(dim=-1) / x.norm(dim=-1)
    assert_close(gradient.norm(dim=-1), gain * weight.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity
    assert_close(cosine(gradient, x), cosine(weight, codes))


def test_rotation_leaves_codes_alone():
    x, codes = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    rotation_trick(x, codes).sum().backward()
    assert codes.grad is None


@pytest.mark.parametrize("max_gain", [None, 0.5])
def test_rotation_of_a_zero_vector_is_straight_through(max_gain):
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    gradient = rotated_gradient(torch.zeros(1, 3), torch.randn(1, 3), weight, max_gain)
    assert_close(gradient, weight * (max_gain or 1.0), rtol=0, atol=0)
    both = rotated_gradient(torch.zeros(1, 3), torch.zeros(1, 3), weight, max_gain)
    assert_close(both, weight * (max_gain or 1.0), rtol=0, atol=0)


def test_rotation_onto_a_zero_code_stops_the_gradient():
    """The limit of the formula as the code becomes shorter."""
    gradient = rotated_gradient(torch.randn(4, 3), torch.zeros(4, 3), torch.randn(4, 3))
    assert_close(gradient, torch.zeros(4, 3), rtol=0, atol=0)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotation_of_opposite_vectors_only_rescales(low):
    x, weight = torch.randn(20, 5).to(low), torch.randn(20, 5).to(low)
    assert_close(rotated_gradient(x, -2 * x, weight), 2 * weight)
    if low.itemsize >= 4:  # opposite up to rounding, which has a direction but no meaning
        assert_close(rotated_gradient(x, -3 * x, weight), 3 * weight)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-3, 1e-2), (1e3, 1e2), (1e2, 1.0)], ids=str)
def test_rotation_of_low_precision_is_computed_in_float32(low, scales):
    x, codes = ((scale * torch.randn(100, 8)).to(low) for scale in scales)
    weight = torch.randn(100, 8).to(low)
    expected = rotation_by_definition(x, codes).mT @ weight.double().unsqueeze(-1)
    size = expected.norm(dim=1)
    error = (rotated_gradient(x, codes, weight) - expected.squeeze(-1)).norm(dim=1) / size[:, 0]
    # `x` is rounded already: only the result is rounded again.
    assert error.max() < 2 * torch.finfo(low).eps + 1e-5


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("large", ["x", "codes", "both", "neither"])
def test_rotation_is_finite_at_the_ends_of_the_range(low, large):
    limits = torch.finfo(low)
    pattern = torch.tensor([1.0, -1.0, 1.0, 0.5]).to(low)
    x = pattern * (limits.max if large in ("x", "both") else limits.smallest_normal)
    codes = pattern.flip(0) * (limits.max if large in ("codes", "both") else limits.smallest_normal)
    rotated = rotation_trick(x, codes)
    assert_close(rotated, codes, rtol=0, atol=0)
    gradient = rotated_gradient(x, codes, pattern)
    assert gradient.isfinite().all()
    if large in ("both", "neither"):  # of equal length: a pure rotation
        assert_close(gradient.double().norm(), pattern.double().norm(), rtol=0.01, atol=0)
    if large == "codes":  # the documented largest gain
        share = (gradient.double() / limits.max**0.5).norm()
        assert_close(share, pattern.double().norm(), rtol=0.02, atol=0)


def test_rotation_bounds_the_gain():
    estimator = functools.partial(rotation_trick, max_gain=1.0)
    x, codes = torch.tensor([[1e-6, 0.0]], requires_grad=True), torch.tensor([[0.0, 3.0]])
    estimator(x, codes).backward(torch.tensor([[0.0, 1.0]]))
    assert_close(x.grad, torch.tensor([[1.0, 0.0]]))


def test_rotation_is_not_touched_by_autocast():
    x, codes, weight = (torch.randn(20, 8) for _ in range(3))
    expected = rotated_gradient(x, codes, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(rotated_gradient(x, codes, weight), expected, rtol=0, atol=0)


def test_rotation_does_not_wait_for_the_device():
    x, codes, weight = (torch.randn(20, 8) for _ in range(3))
    with NoHostSync(), LargestTensor() as largest:
        rotated_gradient(x, codes, weight, max_gain=1.0)
    assert largest.numel <= 20 * 8  # no d x d matrix for each token


def test_rotation_compiles_in_one_graph():
    torch.compiler.reset()
    x, codes, weight = (torch.randn(20, 8) for _ in range(3))
    x.requires_grad_()
    compiled = torch.compile(rotation_trick, fullgraph=True, backend="aot_eager")
    compiled(x, codes, max_gain=2.0).backward(weight)
    assert_close(x.grad, rotated_gradient(x.detach(), codes, weight, max_gain=2.0))


@pytest.mark.parametrize(
    ("x", "codes", "max_gain", "error", "message"),
    [
        (
            torch.zeros(3, 4).long(),
            torch.zeros(3, 4),
            None,
            TypeError,
            "`x` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(3, 4),
            torch.zeros(3, 4).long(),
            None,
            TypeError,
            "`codes` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.zeros(3, 4),
            torch.zeros(4),
            None,
            ValueError,
            "`codes` must have shape (3, 4), got (4,).",
        ),
        (
            torch.zeros(3, 4),
            torch.zeros(3, 4),
            0.0,
            ValueError,
            "`max_gain` must be greater than 0, got 0.0.",
        ),
    ],
)
def test_rotation_rejects_wrong_arguments(x, codes, max_gain, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        rotation_trick(x, codes, max_gain=max_gain)


# In-place operators under `vmap` are slow, and right.
@pytest.mark.filterwarnings("ignore:.*not yet implemented the batching rule:UserWarning")
@pytest.mark.parametrize("estimator", [straight_through, rotation_trick])
def test_function_transforms_see_through_them(estimator):
    x, codes, weight = (torch.randn(5, 4, 3, dtype=torch.float64) for _ in range(3))
    expected = gradient_of(estimator, x, codes, weight)

    def loss(x, codes, weight):
        return (weight * estimator(x, codes)).sum()

    assert_close(torch.func.grad(loss)(x, codes, weight), expected)
    assert_close(torch.func.vmap(torch.func.grad(loss))(x, codes, weight), expected)


@pytest.mark.parametrize("estimator", [straight_through, rotation_trick])
def test_the_gradient_can_be_differentiated_again(estimator):
    """It is linear in what comes back: the derivative of <w, gradient> is the map's transpose."""
    x, codes = (torch.randn(20, 4, dtype=torch.float64) for _ in range(2))
    back = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(estimator(x, codes), x, back, create_graph=True)
    weight = torch.randn(20, 4, dtype=torch.float64)
    (twice,) = torch.autograd.grad((weight * gradient).sum(), back)
    step = torch.randn(20, 4, dtype=torch.float64)
    (moved,) = torch.autograd.grad(estimator(x, codes), x, back.detach() + step)
    assert_close((twice * step).sum(), (weight * (moved - gradient)).sum())


def gradient_of(estimator, x, codes, weight):
    x = x.clone().requires_grad_()
    return torch.autograd.grad((weight * estimator(x, codes)).sum(), x)[0]


@pytest.mark.parametrize("estimator", [straight_through, rotation_trick])
def test_there_is_no_graph_to_the_codes(estimator):
    """With one, a rule that writes to the codebook would spoil the backward pass of the result."""
    codes = torch.randn(5, 3, requires_grad=True)
    assert not estimator(torch.randn(5, 3), codes).requires_grad
