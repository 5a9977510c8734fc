"""CodebookUsage against counting by hand."""

import copy
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from vqprior.metrics import CodebookUsage, UsageSummary, _codebook_usage


def by_hand(indices, size):
    counts = Counter(index for index in indices if index != -1)
    total = sum(counts.values())
    entropy = -sum(c / total * math.log2(c / total) for c in counts.values())
    return {
        "perplexity": 2**entropy if total else 0.0,
        "usage": len(counts) / size,
        "entropy_bits": float(entropy),
        "dead_codes": size - len(counts),
        "num_tokens": total,
        "skipped_tokens": len(indices) - total,
    }


@given(
    batches=st.lists(st.lists(st.integers(-1, 6), max_size=20), max_size=4),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int8]),
)
def test_is_counting_by_hand(batches, dtype):
    meter = CodebookUsage(7)
    for batch in batches:
        meter.update(torch.tensor(batch, dtype=dtype))
    expected = by_hand([index for batch in batches for index in batch], 7)
    summary = meter.compute()
    for name, value in expected.items():
        assert_close(getattr(summary, name), value, rtol=1e-12, atol=1e-12)


def test_shape_does_not_matter():
    indices = torch.randint(-1, 9, (4, 5, 6))
    flat, shaped, scalar = CodebookUsage(9), CodebookUsage(9), CodebookUsage(9)
    flat.update(indices.flatten())
    shaped.update(indices.transpose(0, 2))
    for index in indices.flatten():
        scalar.update(index)
    assert flat.compute() == shaped.compute() == scalar.compute()


def test_computing_twice_gives_the_same_and_reset_forgets():
    meter = CodebookUsage(4)
    meter.update(torch.tensor([0, 3, 3, -1]))
    assert meter.compute() == meter.compute()
    meter.reset()
    nothing = UsageSummary(
        perplexity=0.0, usage=0.0, entropy_bits=0.0, dead_codes=4, num_tokens=0, skipped_tokens=0
    )
    assert meter.compute() == nothing
    assert math.copysign(1, meter.compute().entropy_bits) == 1  # not -0.0


def test_counts_stay_exact_after_casts_and_in_checkpoints():
    meter = CodebookUsage(3).half()
    meter.update(torch.ones(2049, dtype=torch.int64))  # 2049 is no float16
    meter.update(torch.full((2051,), -1))
    fresh = CodebookUsage(3)
    fresh.load_state_dict(copy.deepcopy(meter.state_dict()), strict=True)
    fresh.bfloat16().update(torch.tensor([1, -1]))
    summary = fresh.compute()
    assert (summary.num_tokens, summary.skipped_tokens) == (2050, 2052)
    assert {buffer.dtype for buffer in fresh.buffers()} == {torch.int64}


def test_ranks_are_added_without_changing_the_local_counts(monkeypatch):
    """Two ranks: ours, and one that chose code 2 twice and skipped three tokens."""
    other = torch.tensor([0, 0, 2, 3])
    monkeypatch.setattr(_codebook_usage, "all_reduce_sum_", lambda counts: counts.add_(other))
    meter = CodebookUsage(3)
    meter.update(torch.tensor([0, -1, 1]))
    for _ in range(2):
        summary = meter.compute()
        assert (summary.num_tokens, summary.dead_codes, summary.entropy_bits) == (4, 0, 1.5)
        assert summary.skipped_tokens == 4
    assert (meter.counts.tolist(), meter.skipped.tolist()) == ([1, 1, 0], 1)


@pytest.mark.parametrize("index", [7, -2])
def test_indices_out_of_range_are_an_error(index):
    message = rf"^`indices` must be -1 or in \[0, 7\), got {index}\.$"
    with pytest.raises(ValueError, match=message):
        CodebookUsage(7).update(torch.tensor([index]))


def test_update_compiles_without_graph_break():
    plain, compiled = CodebookUsage(7), CodebookUsage(7)
    step = torch.compile(compiled.update, fullgraph=True, backend="aot_eager", dynamic=False)
    indices = torch.randint(-1, 7, (50,))
    for meter in (plain.update, step):
        meter(indices)
    assert plain.compute() == compiled.compute()


def test_rejects():
    with pytest.raises(ValueError, match=r"`codebook_size` must be at least 1, got 0\."):
        CodebookUsage(0)
    for wrong in (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match=r"`indices` must be an integer tensor, got torch\."):
            CodebookUsage(3).update(wrong)


def test_repr_shows_the_size():
    assert repr(CodebookUsage(5)) == "CodebookUsage(5)"


def test_a_codebook_too_large_to_count():
    message = (
        "`codebook_size` must be at most 2**24, got 68719476736. Count parts of the indices: one "
        "meter for each digit of `functional.split_indices`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CodebookUsage(2**36)
