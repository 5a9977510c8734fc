"""What the Triton kernels of rules compute, against operators; run as `triton_cases.py` is."""

import copy
import dataclasses
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

from tests.contracts.observers import NoHostSync
from vqprior import CodebookEMA, CodebookRevival, ResidualQuantizer, VectorQuantizer
from vqprior.functional._kernels import _triton, _triton_averages
from vqprior.functional._kernels._triton_statistics import add_statistics_, count_tables

LOW = [torch.float16, torch.bfloat16]


@pytest.fixture
def with_kernels(monkeypatch):
    """Steps a rule by kernels."""

    def step(rule, *outs):
        with monkeypatch.context() as patch, NoHostSync():
            patch.setattr(_triton, "is_usable", lambda *tensors: True)
            rule.step(*outs)

    return step


def twins(quantizer, make):
    quantizer.to(DEVICE)
    rule = make(quantizer)
    return (quantizer, rule), copy.deepcopy((quantizer, rule))


def close(actual, expected, dtype):
    # A last bit of float32 decides how float16 rounds.
    error = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    tolerance = {"rtol": error, "atol": error}
    assert_close(actual.state_dict(), expected.state_dict(), **tolerance)


# k, d, n: less than a block, and several blocks of codes and of features.
@pytest.mark.parametrize("size", [(1, 1, 3), (5, 3, 20), (70, 130, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_averages_move_as_by_operators(with_kernels, size, dtype):
    k, d, n = size
    (plain, ema), (fast, fast_ema) = twins(
        VectorQuantizer(d, k).to(dtype), lambda quantizer: CodebookEMA(quantizer, decay=0.9)
    )
    for step in range(4):
        if step == 2:  # rows that others rewrite
            for one in (plain, fast):
                some = torch.arange(k, device=DEVICE) % 2 == 0
                one.codebook.set_codes_(torch.ones(k, d, device=DEVICE), some)
        x = torch.randn(n if step < 3 else 0, d, device=DEVICE, dtype=dtype)
        out = plain(x)
        ema.step(out)
        with_kernels(fast_ema, out)
        close(fast_ema, ema, dtype)
        close(fast, plain, dtype)


def test_averages_of_stages_and_of_several_results_move_as_by_operators(with_kernels):
    shared = VectorQuantizer(3, 6)
    stages = [VectorQuantizer(3, 8), shared, VectorQuantizer(3, 8), shared]
    (plain, ema), (fast, fast_ema) = twins(ResidualQuantizer(stages), CodebookEMA)
    for _ in range(2):
        outs = [plain(torch.randn(2, 10, 3, device=DEVICE)) for _ in range(2)]
        ema.step(*outs)
        with_kernels(fast_ema, *outs)
        close(fast_ema, ema, torch.float32)
        close(fast, plain, torch.float32)


@pytest.mark.parametrize("together", [True, False])
def test_stages_that_lie_in_one_tensor_share_a_launch(with_kernels, monkeypatch, together):
    launched, add = [], _triton_averages.add_to_tables_
    monkeypatch.setattr(
        _triton_averages, "add_to_tables_", lambda *some: launched.append(add(*some))
    )
    stages = ResidualQuantizer([VectorQuantizer(3, 8) for _ in range(3)])
    (plain, ema), (fast, fast_ema) = twins(stages, CodebookEMA)
    out = plain(torch.randn(2, 10, 3, device=DEVICE))
    inputs = torch.stack([selection.inputs for selection in out.selections])
    names = torch.stack([selection.indices for selection in out.selections], dim=-1)
    places = range(3) if together else (2, 0, 1)
    selections = [
        dataclasses.replace(one, inputs=x, indices=names[..., place])
        for one, x, place in zip(out.selections, inputs, places, strict=True)
    ]
    out = dataclasses.replace(out, selections=tuple(selections))
    ema.step(out)
    with_kernels(fast_ema, out)
    assert len(launched) == (1 if together else 3)
    close(fast_ema, ema, torch.float32)
    close(fast, plain, torch.float32)


def test_many_vectors_of_few_codes_share_several_tables(with_kernels):
    assert [count_tables(n, 8) for n in (0, 512, 1024, 1 << 20)] == [1, 1, 2, 16]
    (plain, ema), (_, fast_ema) = twins(VectorQuantizer(4, 2), CodebookEMA)
    out = plain(torch.randn(1000, 4, device=DEVICE))
    ema.step(out)
    with_kernels(fast_ema, out)
    close(fast_ema, ema, torch.float32)
    totals = torch.zeros(4, 2, 2, device=DEVICE)
    add_statistics_(totals, torch.ones(9000, 1, device=DEVICE), torch.arange(9000) % 2)
    assert_close(totals.sum(dim=0).cpu(), torch.full((2, 2), 4500.0), rtol=0, atol=0)
    assert (totals > 0).all()


# k, d, n, tokens per code in a window, and how far the data is: windows close, or never.
REVIVALS = [(5, 3, 20, 3.0, 0), (33, 4, 1100, 20.0, 5), (1, 2, 9, 1.0, 3), (40, 5, 60, 1e6, 50)]


@pytest.mark.parametrize("case", [*REVIVALS, (20, 130, 30, 2.0, 10)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_revival_moves_the_same_codes_onto_the_same_tokens(with_kernels, case, dtype):
    k, d, n, patience, offset = case
    if d > 128 and dtype != torch.float32:
        d = 6  # the interpreter takes seconds for many features
    (plain, revival), (fast, fast_revival) = twins(
        VectorQuantizer(d, k).to(dtype),
        lambda quantizer: CodebookRevival(quantizer, patience=patience, seed=7),
    )
    for step in range(4):
        if step == 2:
            for one in (plain, fast):
                one.codebook.weight.data[k // 2, 0] = torch.nan
        x = offset + torch.randn(n, d, device=DEVICE, dtype=dtype)
        out = plain(x, torch.rand(n, device=DEVICE) > (0.3 if step != 1 else 2.0))
        revival.step(out)
        with_kernels(fast_revival, out)
        assert_close(fast_revival.state_dict(), revival.state_dict(), rtol=0, atol=0)
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        assert_close(fast.codebook.weight, plain.codebook.weight, **exact)


def test_revival_by_kernels_resets_moments(with_kernels):
    quantizer = VectorQuantizer(2, 4).to(DEVICE)
    optimizer = torch.optim.Adam(quantizer.parameters())
    quantizer.codebook.weight.sum().backward()
    optimizer.step()
    revival = CodebookRevival(quantizer, patience=1.0, optimizer=optimizer)
    before = quantizer.codebook.weight.detach().clone()
    version = quantizer.codebook.weight._version
    with_kernels(revival, quantizer(50 + torch.randn(20, 2, device=DEVICE)))
    moved = (quantizer.codebook.weight.detach() != before).any(dim=1)
    assert 0 < moved.sum() < 4
    assert_close(optimizer.state[quantizer.codebook.weight]["exp_avg"].any(dim=1), ~moved)
    assert quantizer.codebook.weight._version > version  # a graph that needs it is told
