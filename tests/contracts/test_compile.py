"""Law 6: bounded memory, no host synchronization, ``torch.compile`` and ``torch.export``."""

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.factories import (
    draw,
    every_learned_quantizer,
    every_quantizer,
    every_rule,
    quantizers_where,
    waits_for_nothing,
)
from tests.contracts.observers import LargestTensor, NoHostSync, watching
from vqprior.functional import _softmax_gradient
from vqprior.functional._kernels import _search_blocks


def train_step(quantizer, x, mask=None):
    out = quantizer(x, mask)
    (out.loss + out.quantized.square().sum()).backward()
    return out


def widest_token(quantizer):
    """Numbers for a token that a call may store, whatever the number of codes.

    Two more columns than features: statistics append a count, revival an error, for each use of
    a shared codebook. A beam keeps that many vectors for each of its members. Entropies of ``g``
    bits take ``2**(g / 2)``.
    """
    dims = [quantizer.dim, *(getattr(module, "dim", 0) for module in quantizer.modules())]
    beam = max(getattr(module, "beam_size", 1) for module in quantizer.modules())
    shared = len(quantizer.codebooks) - len(set(map(id, quantizer.codebooks))) + 1
    return max(beam**2 * max(dims), shared * (max(dims) + 2))


@every_quantizer
def test_nothing_of_size_n_by_k_is_stored(make, monkeypatch):
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_ENTRIES", 512)
    monkeypatch.setattr(_softmax_gradient, "_MAX_BLOCK_ENTRIES", 512)
    quantizer = make()
    x = draw(quantizer, (600,)).requires_grad_()
    with watching(LargestTensor()) as largest:
        train_step(quantizer, x)
        quantizer.decode(quantizer.encode(x))
    assert largest.numel <= x.shape[0] * widest_token(quantizer)


@every_learned_quantizer
def test_the_observer_sees_inside_the_search(make):
    quantizer = make()
    x = draw(quantizer, (100,))
    with watching(LargestTensor()) as largest:
        quantizer.encode(x)
    assert largest.numel >= 100 * max(quantizer.dim, min(c.num_codes for c in quantizer.codebooks))


@quantizers_where(waits_for_nothing)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_waits_for_the_device(make, training):
    quantizer = make().train(training)
    x, mask = draw(quantizer).requires_grad_(), torch.rand(32) > 0.3
    with watching(NoHostSync()):
        train_step(quantizer, x, mask)
        quantizer.decode(quantizer.encode(x, mask))


@every_learned_quantizer
@every_rule
def test_rules_wait_for_nothing_and_store_little(make, rule):
    quantizer = make().eval()
    learner = rule(quantizer)
    x = draw(quantizer, (600,))
    out = quantizer(x)
    with watching(NoHostSync()):
        learner.step(out)
    with watching(LargestTensor()) as largest:
        learner.step(out)
    assert largest.numel <= 601 * widest_token(quantizer)


@quantizers_where(waits_for_nothing)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(make, training):
    torch.compiler.reset()
    quantizer, twin = make().train(training), make().train(training)
    twin.load_state_dict(quantizer.state_dict())
    x, mask = draw(quantizer).requires_grad_(), torch.rand(32) > 0.3
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    results = []
    for each in (compiled, twin):
        torch.manual_seed(1)
        results.append(train_step(each, x, mask))
    for name in ("quantized", "indices", "loss", "terms"):
        assert_close(getattr(results[0], name), getattr(results[1], name))
    for ours, theirs in zip(quantizer.parameters(), twin.parameters(), strict=True):
        none = torch.zeros_like(ours)  # a graph returns zeros where eager has no gradient
        assert_close(*(none if p.grad is None else p.grad for p in (ours, theirs)))


@quantizers_where(waits_for_nothing)
def test_exports_in_eval(make):
    quantizer = make().eval()
    x = draw(quantizer)
    exported = torch.export.export(quantizer, (x,)).module()
    assert_close(exported(x).quantized, quantizer(x).quantized, rtol=0, atol=0)
    assert_close(exported(x).indices, quantizer(x).indices, rtol=0, atol=0)


@quantizers_where(waits_for_nothing)
def test_exports_with_a_free_batch_size(make):
    quantizer = make().eval()
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(quantizer, (draw(quantizer),), dynamic_shapes=shapes)
    x = draw(quantizer, (77,), seed=1)
    assert_close(program.module()(x).indices, quantizer(x).indices, rtol=0, atol=0)
