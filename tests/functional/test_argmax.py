"""The first arg-max, by numpy and by torch."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from vqprior.functional import _argmax, select_codes
from vqprior.functional._argmax import first_argmax

INF, NAN = torch.inf, torch.nan
ROWS = [[0.0, -0.0, 0.0], [1.0, 2.0, 2.0], [-INF] * 3, [INF, NAN, NAN], [-1.0, -3.0, -1.0]]


@pytest.fixture(params=["numpy", "torch"], autouse=True)
def reader(request, monkeypatch):
    """Both ways, whatever the number of threads."""
    if request.param == "torch":
        monkeypatch.setattr(_argmax, "_READABLE", frozenset())
        monkeypatch.setattr(_argmax, "_WIDENED", frozenset())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_of_equal_entries_is_taken_and_nan_is_largest(dtype):
    found = first_argmax(torch.tensor(ROWS, dtype=dtype))
    assert_close(found, torch.tensor([0, 1, 0, 1, 0]), rtol=0, atol=0)


@pytest.mark.parametrize("leading", [(), (5,), (2, 0, 3), (2, 3)], ids=str)
def test_any_shape_and_strides(leading):
    scores = torch.randn(7, *leading).movedim(0, -1)
    found = first_argmax(scores)
    assert (found.shape, found.dtype) == (leading, torch.int64)
    assert_close(found, scores.argmax(dim=-1))


def test_tracers_see_the_choice():
    """A value read on the host would become a constant of the graph."""
    codes = torch.randn(7, 2)
    graph = make_fx(lambda logits: select_codes(logits, codes)[1])(torch.randn(5, 7))
    other = torch.randn(5, 7)
    assert_close(graph(other), other.argmax(dim=-1))
