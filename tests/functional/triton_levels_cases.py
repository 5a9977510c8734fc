"""What the kernels of `FSQ` compute, against plain operators. `test_triton_levels.py` runs it."""

import os

import pytest
import torch
from torch.testing import assert_close

if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = torch.device("cpu")
elif torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from vqprior import FSQ
from vqprior.functional._kernels import _triton

# One feature, a number that is no power of two, and more than a thousand levels.
LEVELS = [[7], [8, 5, 5, 5], [3, 4, 1001], [3] * 39]
LOW = [torch.float16, torch.bfloat16]
# The interpreter cuts bits off where a GPU rounds to bfloat16.
STEPS = {torch.float32: 0, torch.float16: 0, torch.bfloat16: 2**-7 if DEVICE.type == "cpu" else 0}


def exactly(actual, expected):
    assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0)


def usable(monkeypatch, *, yes):
    monkeypatch.setattr(_triton, "is_usable", lambda *tensors: yes)


def step(fsq, x, mask):
    """Result and gradient; the weights of the gradient differ from feature to feature."""
    x = x.clone().to(DEVICE).requires_grad_()
    out = fsq(x, mask)
    weights = torch.linspace(-1, 1, x.numel(), device=DEVICE).view(x.shape).to(x.dtype)
    return out, torch.autograd.grad(out.quantized, x, weights)[0]


@pytest.mark.parametrize("symmetric", [False, True], ids=["paper", "symmetric"])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("leading", [(), (0,), (5, 67), (300,)], ids=str)
def test_the_kernels_match_plain_operators(monkeypatch, symmetric, levels, dtype, leading):
    torch.manual_seed(0)
    fsq = FSQ(levels, symmetric=symmetric).to(DEVICE)
    x, mask = 2 * torch.randn(*leading, len(levels)), torch.rand(leading, device=DEVICE) > 0.2
    if leading == (300,):
        x[3, 0], x[7, -1], x[8] = torch.nan, torch.inf, -torch.inf
    x = x.to(dtype)
    results = []
    for yes in (False, True):
        usable(monkeypatch, yes=yes)
        results.append(step(fsq, x, mask))
        exactly(fsq.encode(x.to(DEVICE), mask), results[-1][0].indices)
    (plain, of_plain), (fused, of_fused) = results
    exactly(fused.indices, plain.indices)
    exactly(fused.indices >= 0, (plain.indices >= 0) & mask)
    assert_close(fused.quantized, plain.quantized, rtol=STEPS[dtype], atol=0)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(of_fused, of_plain, rtol=tolerance, atol=tolerance)
    exactly(of_fused[plain.indices < 0], torch.zeros_like(x)[plain.indices.cpu() < 0])


@pytest.mark.parametrize("symmetric", [False, True], ids=["paper", "symmetric"])
def test_codes_are_those_of_decode(monkeypatch, symmetric):
    usable(monkeypatch, yes=True)
    fsq = FSQ([8, 6, 7, 1001], symmetric=symmetric).to(DEVICE)
    out = fsq(2 * torch.randn(500, 4, device=DEVICE))
    exactly(out.quantized, fsq.decode(out.indices))


@pytest.mark.parametrize("level", [2, 4, 8])
def test_ties_go_to_the_lower_level(monkeypatch, level):
    usable(monkeypatch, yes=True)
    fsq = FSQ([level], symmetric=True).to(DEVICE)
    assert fsq.encode(torch.zeros(1, 1, device=DEVICE)).item() == level // 2 - 1


def test_the_largest_code_space(monkeypatch):
    usable(monkeypatch, yes=True)
    fsq = FSQ([2**20, 2**20, 2**20, 4], symmetric=True).to(DEVICE)
    ends = torch.tensor([[50.0] * 4, [-50.0] * 4], device=DEVICE)
    assert fsq.encode(ends).tolist() == [2**62 - 1, 0]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, :3],
        lambda x: x[:, 1:6:2],
        lambda x: x[:3].T,
        lambda x: x[:1, :3].expand(9, -1),
    ],
    ids=["rows", "columns", "transposed", "repeated"],
)
def test_any_strides(monkeypatch, view):
    usable(monkeypatch, yes=True)
    fsq, x = FSQ([5, 4, 3]).to(DEVICE), view(torch.randn(20, 6, device=DEVICE))
    mask = (torch.arange(2 * len(x), device=DEVICE) % 3 > 0)[::2]
    exactly(fsq.encode(x, mask), fsq.encode(x.contiguous(), mask.contiguous()))


def test_derivatives_of_higher_order(monkeypatch):
    fsq, x = FSQ([5, 4, 3]).to(DEVICE), torch.randn(9, 3, device=DEVICE)
    x[2, 1] = torch.nan
    found = []
    for yes in (False, True):
        usable(monkeypatch, yes=yes)
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(fsq(leaf).quantized.sum(), leaf, create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert_close(found[1], found[0])


def test_wrong_input_is_found(monkeypatch):
    usable(monkeypatch, yes=True)
    fsq, x = FSQ([5, 4, 3]).to(DEVICE), torch.zeros(2, 3, device=DEVICE)
    with pytest.raises(TypeError, match="`x` must be a floating-point tensor"):
        fsq(x.long())
    with pytest.raises(ValueError, match="`x` must have shape"):
        fsq(x[:, :2])
    with pytest.raises(TypeError, match="`mask` must be a boolean tensor"):
        fsq(x, torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="`mask` must have shape"):
        fsq.encode(x, torch.ones(3, device=DEVICE) > 0)
