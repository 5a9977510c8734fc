"""Law 6: bounded memory, and no host synchronization."""

import math

import pytest

from tests.contracts.factories import (
    every_learned_quantizer,
    every_quantizer,
    every_rule,
    quantizers_where,
)
from tests.contracts.layouts import draw, draw_mask, map_size
from tests.contracts.observers import LargestTensor, NoHostSync
from tests.contracts.traits import waits_for_nothing
from vqprior.functional import _softmax_gradient
from vqprior.functional._kernels import _bit_tables, _search_blocks


def train_step(quantizer, x, mask=None):
    out = quantizer(x, mask)
    (out.loss + out.quantized.square().sum()).backward()
    return out


def widest_token(quantizer):
    """Numbers per token that a call may store, for any number of codes.

    Two more than the features for each use of a shared codebook: statistics append a count,
    revival an error. A beam stores as many for each of its paths. Entropies of ``g`` bits take
    ``2**(g / 2)``.
    """
    dims = [quantizer.dim, *(getattr(module, "dim", 0) for module in quantizer.modules())]
    beam = max(getattr(module, "beam_size", 1) for module in quantizer.modules())
    shared = len(quantizer.codebooks) - len(set(map(id, quantizer.codebooks))) + 1
    return max(beam**2 * max(dims), shared * (max(dims) + 2))


def many(quantizer, count=600):
    """Leading dimensions with at least the wanted number of tokens, and that number."""
    size = math.prod(map_size(quantizer))
    samples = math.ceil(count / size)
    return (samples,), samples * size


@every_quantizer
def test_nothing_of_size_n_by_k_is_stored(make, monkeypatch):
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_ENTRIES", 512)
    monkeypatch.setattr(_softmax_gradient, "_MAX_BLOCK_ENTRIES", 512)
    monkeypatch.setattr(_bit_tables, "_BLOCK", 512)
    quantizer = make()
    leading, count = many(quantizer)
    x = draw(quantizer, leading).requires_grad_()
    with LargestTensor() as largest:
        train_step(quantizer, x)
        quantizer.decode(quantizer.encode(x))
    assert largest.numel <= count * widest_token(quantizer)


@every_learned_quantizer
def test_the_observer_sees_inside_the_search(make):
    quantizer = make()
    x = draw(quantizer, (100,))
    with LargestTensor() as largest:
        quantizer.encode(x)
    assert largest.numel >= 100 * max(quantizer.dim, min(c.num_codes for c in quantizer.codebooks))


@quantizers_where(waits_for_nothing)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_waits_for_the_device(make, training):
    quantizer = make().train(training)
    x, mask = draw(quantizer).requires_grad_(), draw_mask(quantizer)
    with NoHostSync():
        train_step(quantizer, x, mask)
        quantizer.decode(quantizer.encode(x, mask))


@every_learned_quantizer
@every_rule
def test_rules_wait_for_nothing_and_store_little(make, rule):
    quantizer = make().eval()
    learner = rule(quantizer)
    leading, count = many(quantizer)
    x = draw(quantizer, leading)
    out = quantizer(x)
    with NoHostSync():
        learner.step(out)
    with LargestTensor() as largest:
        learner.step(out)
    assert largest.numel <= (count + 1) * widest_token(quantizer)
