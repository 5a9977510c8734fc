"""`TransformedCodebook`: codes that a module computes, all moved by one step."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from vqprior import (
    CodebookEMA,
    CodebookRevival,
    EmbeddingCodebook,
    NormalizedCodebook,
    TransformedCodebook,
    VectorQuantizer,
    initialize_codebooks_,
)


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def frozen(k=16, d=4):
    return EmbeddingCodebook(k, d).requires_grad_(requires_grad=False)


def simvq(**options):
    return VectorQuantizer(
        4, 16, codebook=TransformedCodebook(frozen(), nn.Linear(4, 4)), **options
    )


def test_codes_are_those_of_the_module():
    table, module = (
        EmbeddingCodebook(9, 3),
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)),
    )
    codebook = TransformedCodebook(table, module)
    exactly(codebook.codes(), module(table.weight))
    assert (codebook.num_codes, codebook.dim) == (9, 5)


def test_quantizes_to_the_transformed_codes():
    quantizer, x = simvq(), torch.randn(50, 4)
    codes = quantizer.codebook.codebook.weight @ quantizer.codebook.module.weight.T
    codes = codes + quantizer.codebook.module.bias
    out = quantizer(x)
    exactly(out.indices, torch.cdist(x.double(), codes.double()).argmin(dim=1))
    assert_close(out.quantized, codes[out.indices])


def test_one_step_moves_every_code():
    quantizer = simvq()
    before = quantizer.codebook.codes().detach().clone()
    underneath = quantizer.codebook.codebook.weight.clone()
    optimizer = torch.optim.SGD([p for p in quantizer.parameters() if p.requires_grad], lr=0.1)
    quantizer(torch.randn(1, 4)).loss.backward()
    optimizer.step()
    assert (quantizer.codebook.codes() != before).any(dim=1).all()
    exactly(quantizer.codebook.codebook.weight, underneath)


def test_the_gradient_of_the_module_is_that_of_the_codebook_term():
    quantizer, x = simvq(), torch.randn(30, 4)
    out = quantizer(x)
    (actual,) = torch.autograd.grad(out.loss, quantizer.codebook.module.weight)
    chosen = quantizer.codebook.codebook.weight[out.indices]
    errors = F.linear(chosen, quantizer.codebook.module.weight, quantizer.codebook.module.bias) - x
    assert_close(actual, (2 * errors.T @ chosen / x.numel()).detach())


def test_a_table_that_is_not_frozen_learns_too():
    quantizer = VectorQuantizer(
        4, 16, codebook=TransformedCodebook(EmbeddingCodebook(16, 4), nn.Linear(4, 4))
    )
    quantizer(torch.randn(30, 4)).loss.backward()
    assert quantizer.codebook.codebook.weight.grad.any()
    quantizer.requires_grad_(requires_grad=False)
    assert sorted(quantizer(torch.randn(30, 4)).terms) == ["commitment"]


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_the_same_codes(low):
    codebook = TransformedCodebook(frozen(), nn.Linear(4, 4))
    expected = codebook.codes()
    with torch.autocast("cpu", dtype=low):
        exactly(codebook.codes(), expected)
        exactly(TransformedCodebook(codebook.codebook, codebook.module).codes(), expected)


@pytest.mark.parametrize("rule", [CodebookEMA, CodebookRevival])
def test_rules_and_starts_cannot_set_what_is_computed(rule):
    quantizer = simvq()
    message = (
        "`codebook` must hold codes that can be set, got TransformedCodebook, which computes them. "
        "Train it by gradient, without rules; start it by setting what is underneath."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rule(quantizer)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        initialize_codebooks_(quantizer, torch.randn(50, 4), method="sample")
    normalized = VectorQuantizer(4, 16, codebook=NormalizedCodebook(quantizer.codebook))
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
        TransformedCodebook(frozen(), module)


def test_a_module_that_returns_another_number_of_codes():
    class Half(nn.Module):
        def forward(self, codes):
            return codes[::2]

    message = r"^`module\(codes\)` must have shape \(16, 4\), got \(8, 4\)\.$"
    with pytest.raises(ValueError, match=message):
        TransformedCodebook(frozen(), Half())


def test_the_state_is_that_of_both():
    keys = sorted(simvq().state_dict())
    assert keys == ["codebook.codebook.weight", "codebook.module.bias", "codebook.module.weight"]
