"""What the kernels of `LFQ` and `BSQ` compute, against plain operators."""

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

from vqprior import BSQ, LFQ
from vqprior.functional._kernels import _triton

QUANTIZERS = {
    "lfq": lambda: LFQ(12),
    "lfq-soft": lambda: LFQ(12, temperature=1.0),
    "lfq-one-bit": lambda: LFQ(1, temperature=0.5),
    "lfq-without-entropies": lambda: LFQ(6, sample_entropy_weight=0.0, batch_entropy_weight=0.0),
    "lfq-entropy-of-tokens": lambda: LFQ(7, commitment_weight=0.0, batch_entropy_weight=0.0),
    "bsq": lambda: BSQ(12, commitment_weight=0.25),
    "bsq-small-groups": lambda: BSQ(5, group_size=2),
    "bsq-large-groups": lambda: BSQ(19, group_size=10),
}
every_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)


def exactly(actual, expected):
    assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0)


def usable(monkeypatch, *, yes):
    monkeypatch.setattr(_triton, "is_usable", lambda *tensors: yes)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("leading", [(0,), (3, 67)], ids=str)
def test_the_kernels_match_plain_operators(monkeypatch, make, dtype, leading):
    torch.manual_seed(0)
    quantizer = make().to(DEVICE)
    x, mask = torch.randn(*leading, quantizer.dim), torch.rand(leading, device=DEVICE) > 0.2
    if x.numel() > 0:
        x[0, 3, 0], x[1, 7], x[2, 8] = torch.nan, torch.inf, 0.0
    x = x.to(DEVICE, dtype)
    weights, found = torch.randn(x.shape, device=DEVICE), []
    for yes in (False, True):
        usable(monkeypatch, yes=yes)
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf, mask)
        exactly(quantizer.encode(x, mask), out.indices)
        exactly(quantizer.decode(out.indices).to(dtype), out.quantized)
        wanted = (
            (weights * out.quantized).sum(),
            out.loss,
            (weights * out.quantized).sum() + out.loss,
        )
        gradients = [torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in wanted]
        found.append((out, gradients))
    (plain, of_plain), (fused, of_fused) = found
    exactly(fused.indices, plain.indices)
    exactly(fused.quantized, plain.quantized)
    assert_close(fused.terms, plain.terms, rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert_close(of_fused, of_plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [lambda: LFQ(5, temperature=1.0), lambda: BSQ(5)])
def test_derivatives_of_higher_order(monkeypatch, make):
    quantizer, x, found = make().to(DEVICE), torch.randn(9, 5, device=DEVICE), []
    for yes in (False, True):
        usable(monkeypatch, yes=yes)
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf)
        loss = out.loss + out.quantized.sum()
        first = torch.autograd.grad(loss, leaf, create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert_close(found[1], found[0])


def test_where_order_must_not_matter_plain_operators_are_used(monkeypatch):
    usable(monkeypatch, yes=True)
    torch.use_deterministic_algorithms(True)
    try:
        out = LFQ(5).to(DEVICE)(torch.randn(9, 5, device=DEVICE, requires_grad=True))
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert "Fused" not in type(out.quantized.grad_fn).__name__
