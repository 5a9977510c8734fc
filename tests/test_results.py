"""How results print, let go of gradients, and say that they have fields."""

import dataclasses

import pytest
import torch
from torch.nn.parallel.scatter_gather import gather
from torch.utils._pytree import tree_leaves

from tests.contracts.factories import every_learned_quantizer, every_quantizer, every_rule, state
from tests.contracts.layouts import draw, exactly
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


@every_quantizer
def test_a_detached_result_holds_no_graph(make):
    quantizer = make().eval()
    out = quantizer(draw(quantizer).requires_grad_())
    copy = out.detach()
    assert any(leaf.requires_grad for leaf in tree_leaves(out))
    assert not any(leaf.requires_grad for leaf in tree_leaves(copy))
    exactly(tree_leaves(copy), [leaf.detach() for leaf in tree_leaves(out)])
    assert repr(copy) == repr(out)


@every_learned_quantizer
@every_rule
def test_rules_learn_the_same_from_detached_results(make, rule):
    first, second = make().eval(), make().eval()
    second.load_state_dict(first.state_dict())
    learners = rule(first), rule(second)
    outs = first(draw(first)), second(draw(second)).detach()
    for learner, out in zip(learners, outs, strict=True):
        learner.step(out)
    exactly(state(first), state(second))
    exactly(state(learners[0]), state(learners[1]))


def test_a_result_is_not_a_tuple():
    out = VectorQuantizer(8, 16)(torch.zeros(3, 8))
    message = (
        r"^`out` must be read by its fields, such as `out\.quantized` and `out\.loss`, got an "
        r"attempt to unpack it\. `nn\.DataParallel` unpacks results: use "
        r"`DistributedDataParallel`\.$"
    )
    with pytest.raises(TypeError, match=message):
        _, _, _ = out
    with pytest.raises(TypeError, match=message):
        gather([out, out], "cpu")  # what `nn.DataParallel` does


def test_without_values_a_result_prints_too():
    out = VectorQuantizer(8, 16)(torch.zeros(3, 8))
    out = dataclasses.replace(out, loss=out.loss.to("meta"))
    assert "    loss=float32 ()," in repr(out)
