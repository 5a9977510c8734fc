"""Claims on memory, operators and graphs: 4, 6, 24. What takes time is for benchmarks to say."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.claims.cast import (
    MAP,
    QUANTIZERS,
    RULES,
    maps,
    quantizers_where,
    rules_can_write,
    skips_what_is_not_finite,
    some_tokens,
)
from tests.contracts.factories import DIM, state, vq
from tests.contracts.observers import LargestTensor, NoHostSync, watching
from vqprior import BSQ, LFQ, CodebookEMA, CodebookRevival, GroupedQuantizer, ResidualQuantizer
from vqprior.functional import IndexBackpropagation, _softmax_gradient
from vqprior.functional._kernels import _search_blocks

BLOCK = 1 << 14


def train_step(quantizer, x, mask=None):
    out = quantizer(x, mask)
    (out.loss + out.quantized.square().sum()).backward()
    return out


SEARCHES = {
    "plain": lambda: vq(k=512, d=8),
    "cosine": lambda: vq(k=512, d=8, metric="cosine"),
    "index-backpropagation": lambda: vq(k=512, d=8, estimator=IndexBackpropagation()),
    "residual": lambda: ResidualQuantizer([vq(k=512, d=8) for _ in range(3)]),
    "grouped": lambda: GroupedQuantizer([vq(k=512, d=4), vq(k=512, d=4)]),
}


@pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES.keys())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_claim_04_nothing_of_tokens_by_codes_is_stored(make, training, monkeypatch):
    """vector-quantize-pytorch stores several matrices of tokens x codes, one of them int64: 12 GiB
    for 65536 tokens and 8192 codes. Here the largest tensor of a training step, rules included,
    is a block of bounded size, or as large as the tokens or the codes."""
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_ENTRIES", BLOCK)
    monkeypatch.setattr(_softmax_gradient, "_MAX_BLOCK_ENTRIES", BLOCK)
    quantizer = make().train(training)
    rules = [RULES["ema"](quantizer), RULES["revival"](quantizer)] if training else []
    tokens = 4096
    x = torch.randn(tokens, 8, requires_grad=training)
    with watching(LargestTensor()) as largest:
        if training:
            out = train_step(quantizer, x)
            for rule in rules:
                rule.step(out)
        else:
            quantizer.decode(quantizer.encode(x))
    # Rules append two columns to what each of the stages saw.
    assert largest.numel <= max(BLOCK, (tokens + 1) * (8 + 2), 512 * (8 + 2))
    assert largest.numel < tokens * 512 / 50


@pytest.mark.parametrize("make", [lambda: LFQ(20), lambda: BSQ(20)], ids=["lfq", "bsq"])
def test_claim_04_lookup_free_quantizers_list_no_codes(make):
    """vector-quantize-pytorch holds a buffer of all codes of its lookup-free quantizer, 80 MiB
    for 20 bits, and a softmax of tokens x codes. Here codes are never listed."""
    quantizer = make()
    assert not quantizer.state_dict()
    with watching(LargestTensor()) as largest:
        train_step(quantizer, torch.randn(100, 20, requires_grad=True))
    assert largest.numel < 2**20 / 50


def test_claim_04_blocks_change_no_index(monkeypatch):
    """vector-quantize-pytorch needs the whole matrix to find its minimum. Here indices found
    block by block are those of a search in float64."""
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_ENTRIES", BLOCK)
    monkeypatch.setattr(_search_blocks, "_MAX_BLOCK_CODES", 100)
    quantizer = vq(k=512, d=8)
    x = torch.randn(1000, 8)
    expected = torch.cdist(x.double(), quantizer.codebook.weight.double()).argmin(dim=1)
    assert_close(quantizer.encode(x), expected, rtol=0, atol=0)


COMPILED = [
    "euclidean",
    "residual",
    "residual-beam",
    "residual-dropout",
    "channel-first-multi-scale",
    "self-updating",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_claim_06_a_training_step_is_one_graph(name, training):
    """vector-quantize-pytorch breaks its graph 4 to 13 times. Here `torch.compile` of a call with
    a mask, rules and revival included, makes one graph with the results of eager mode."""
    torch.compiler.reset()
    quantizer, twin = (QUANTIZERS[name]().train(training) for _ in range(2))
    twin.load_state_dict(quantizer.state_dict())
    found = []
    for each in (quantizer, twin):
        rules = nn.ModuleList(rule(each) for rule in RULES.values() if training)

        def step(x, mask, each=each, rules=rules):
            out = each(x, mask)
            for rule in rules:
                rule.step(out)
            return out

        call = torch.compile(step, fullgraph=True, backend="aot_eager") if each is twin else step
        torch.manual_seed(5)
        out = call(maps(each), some_tokens())
        found.append((out.quantized, out.terms, state(each), state(rules)))
    if name != "residual-dropout" or not training:  # compiled code draws in another order
        assert_close(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_claim_06_exports_with_a_free_batch_size(name):
    """vector-quantize-pytorch cannot be exported. Here `torch.export` takes every size of batch
    and a mask."""
    quantizer = QUANTIZERS[name]().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        quantizer, (maps(quantizer), some_tokens()), dynamic_shapes=({0: batch}, {0: batch})
    )
    x, mask = maps(quantizer, 1, count=5), torch.rand(5, *MAP[1:]) > 0.3
    exported, expected = program.module()(x, mask), quantizer(x, mask)
    assert_close(exported.quantized, expected.quantized, rtol=0, atol=0)
    assert_close(exported.indices, expected.indices, rtol=0, atol=0)


@quantizers_where(skips_what_is_not_finite)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_claim_06_nothing_waits_for_the_device(make, training):
    """vector-quantize-pytorch reads up to 24 values back to the host in one forward. Here a call,
    its backward pass, decoding, and steps of rules read none."""
    quantizer = make().train(training)
    rules = [rule(quantizer) for rule in RULES.values()] if rules_can_write(quantizer) else []
    x, mask = maps(quantizer).requires_grad_(), some_tokens()
    with watching(NoHostSync()):
        out = train_step(quantizer, x, mask)
        quantizer.decode(quantizer.encode(x, mask))
        for rule in rules:
            rule.step(out)


class Operators(TorchDispatchMode):
    """Counts operators, and the entries of all their results."""

    count = entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(result, torch.Tensor):
            self.entries += result.numel()
        return result


def cost(make, call):
    quantizer = make()
    x = torch.randn(64, DIM, requires_grad=True)
    with watching(Operators()) as operators:
        call(quantizer, x)
    return operators.count, operators.entries


def step_with_rules(quantizer, x):
    out = train_step(quantizer, x)
    CodebookEMA(quantizer).step(out)
    CodebookRevival(quantizer).step(out)


CALLS = {
    "encode": lambda quantizer, x: quantizer.encode(x),
    "forward": lambda quantizer, x: quantizer(x),
    "train": train_step,
    "rules": step_with_rules,
    "logits": lambda quantizer, x: quantizer.logits(x),
}
STACKS = {
    "own": lambda count: ResidualQuantizer([vq() for _ in range(count)]),
    "shared": lambda count: ResidualQuantizer([vq()] * count),
    "beam": lambda count: ResidualQuantizer([vq() for _ in range(count)], beam_size=4),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_claim_24_the_cost_of_a_residual_quantizer_is_linear_in_its_stages(call, stack):
    """vector-quantize-pytorch copies all earlier residuals at every stage: 5 times the cost of a
    loop at 32 stages. Here each further stage costs as many operators, and as many numbers, as
    the one before. What that is in seconds is for benchmarks to say."""
    counts = [4, 8, 12, 16]
    costs = [cost(lambda c=c: stack(c), call) for c in counts]
    for measure, results in zip(("operators", "entries"), zip(*costs, strict=True), strict=True):
        growth = torch.tensor(results).diff()
        assert (growth > 0).all()
        # A search of a beam, and a concatenation of all stages, may add a little here and there.
        assert growth.max() <= 1.1 * growth.min(), (measure, results)


def test_claim_24_a_stage_costs_what_its_quantizer_costs():
    """vector-quantize-pytorch makes a stage dearer than its quantizer. Here 32 stages take at
    most 1.3 times the numbers of a hand-written loop over the same quantizers."""
    stages = [vq() for _ in range(32)]

    def loop(_, x):
        rest = x.detach()
        for stage in stages:
            rest = rest - stage.decode(stage.encode(rest))

    by_hand = cost(lambda: None, loop)
    ours = cost(lambda: ResidualQuantizer(stages), lambda quantizer, x: quantizer.encode(x))
    assert ours[1] <= 1.3 * by_hand[1]
