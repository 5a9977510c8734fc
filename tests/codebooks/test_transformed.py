"""`Transformed`: codes that a module computes, all moved by one step."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import (
    CodebookEMA,
    CodebookRevival,
    Normalized,
    Table,
    Transformed,
    VectorQuantizer,
    initialize_,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def frozen(k=16, d=4):
    return Table(k, d).requires_grad_(requires_grad=False)


def simvq(**options):
    return VectorQuantizer(4, 16, codebook=Transformed(frozen(), nn.Linear(4, 4)), **options)


def test_codes_are_those_of_the_module():
    table, module = Table(9, 3), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))
    codebook = Transformed(table, module)
    exactly(codebook.vectors(), module(table.codes))
    assert (codebook.num_codes, codebook.dim) == (9, 5)


def test_quantizes_to_the_transformed_codes():
    quantizer, x = simvq(), torch.randn(50, 4)
    codes = quantizer.codebook.codebook.codes @ quantizer.codebook.module.weight.T
    codes = codes + quantizer.codebook.module.bias
    out = quantizer(x)
    exactly(out.indices, torch.cdist(x.double(), codes.double()).argmin(dim=1))
    assert_close(out.quantized, codes[out.indices])


def test_one_step_moves_every_code():
    quantizer = simvq()
    before = quantizer.codebook.vectors().detach().clone()
    underneath = quantizer.codebook.codebook.codes.clone()
    optimizer = torch.optim.SGD([p for p in quantizer.parameters() if p.requires_grad], lr=0.1)
    quantizer(torch.randn(1, 4)).loss.backward()
    optimizer.step()
    assert (quantizer.codebook.vectors() != before).any(dim=1).all()
    exactly(quantizer.codebook.codebook.codes, underneath)


def test_the_gradient_of_the_module_is_that_of_the_codebook_term():
    quantizer, x = simvq(), torch.randn(30, 4)
    out = quantizer(x)
    (actual,) = torch.autograd.grad(out.loss, quantizer.codebook.module.weight)
    chosen = quantizer.codebook.codebook.codes[out.indices]
    errors = F.linear(chosen, quantizer.codebook.module.weight, quantizer.codebook.module.bias) - x
    assert_close(actual, (2 * errors.T @ chosen / x.numel()).detach())


def test_a_table_that_is_not_frozen_learns_too():
    quantizer = VectorQuantizer(4, 16, codebook=Transformed(Table(16, 4), nn.Linear(4, 4)))
    quantizer(torch.randn(30, 4)).loss.backward()
    assert quantizer.codebook.codebook.codes.grad.any()
    quantizer.requires_grad_(requires_grad=False)
    assert sorted(quantizer(torch.randn(30, 4)).terms) == ["commitment"]


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_the_same_codes(low):
    codebook = Transformed(frozen(), nn.Linear(4, 4))
    expected = codebook.vectors()
    with torch.autocast("cpu", dtype=low):
        exactly(codebook.vectors(), expected)
        exactly(Transformed(codebook.codebook, codebook.module).vectors(), expected)


@pytest.mark.parametrize("rule", [CodebookEMA, CodebookRevival])
def test_rules_and_starts_cannot_set_what_is_computed(rule):
    quantizer = simvq()
    message = (
        "`codebook` must hold codes that can be set, got Transformed, which computes them. Train "
        "it by gradient, without rules; start it by setting what is underneath."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rule(quantizer)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        initialize_(quantizer, torch.randn(50, 4), method="sample")
    normalized = VectorQuantizer(4, 16, codebook=Normalized(quantizer.codebook))
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rule(normalized)
    assert all(p.requires_grad for p in quantizer.codebook.module.parameters())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Flatten(0), "`module(codes)` must have shape (16, 64), got (64,)."),
        (nn.Unflatten(1, (2, 2)), "`module(codes)` must have shape (16, 2), got (16, 2, 2)."),
    ],
)
def test_a_module_that_returns_no_matrix(module, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Transformed(frozen(), module)


def test_a_module_that_returns_another_number_of_codes():
    class Half(nn.Module):
        def forward(self, codes):
            return codes[::2]

    message = r"^`module\(codes\)` must have shape \(16, 4\), got \(8, 4\)\.$"
    with pytest.raises(ValueError, match=message):
        Transformed(frozen(), Half())


def test_the_state_is_that_of_both():
    keys = sorted(simvq().state_dict())
    assert keys == ["codebook.codebook.codes", "codebook.module.bias", "codebook.module.weight"]
