"""How results print."""

import dataclasses

import torch

from vqprior import ResidualQuantizer, VectorQuantizer


def test_a_result_prints_on_a_few_lines():
    rvq = ResidualQuantizer([VectorQuantizer(8, 16) for _ in range(2)]).half()
    out = rvq(torch.zeros(3, 5, 8).half())
    lines = repr(out).splitlines()
    assert lines[:3] == [
        "QuantizerOutput(",
        "    quantized=float16 (3, 5, 8),",
        "    indices=int64 (3, 5, 2),",
    ]
    assert lines[3] == f"    loss={out.loss:.4g},"
    assert lines[4].startswith("    terms={'commitment': 0.")
    assert lines[5:] == ["    selections=<2 with inputs of (3, 5, 8), (3, 5, 8)>,", ")"]
    assert repr(out.selections[1]) == (
        "Selection(inputs=float32 (3, 5, 8), codes=float16 (3, 5, 8), indices=int64 (3, 5), "
        "mask=bool (3, 5))"
    )


def test_without_values_a_result_prints_too():
    out = VectorQuantizer(8, 16)(torch.zeros(3, 8))
    out = dataclasses.replace(out, loss=out.loss.to("meta"))
    assert "    loss=float32 ()," in repr(out)
