"""Law 6: ``torch.compile`` in train and eval, ``torch.export`` in eval, each in one graph.

And ``torch.jit.trace``, whose traces fit other batch sizes.

Covers each class and the options that change its graph; ``test_cross_product.py`` draws nestings at
random.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.contracts.factories import QUANTIZERS, REPRESENTATIVE, RULES, state
from tests.contracts.layouts import draw, draw_mask, exactly
from tests.contracts.test_cost import train_step
from tests.contracts.traits import waits_for_nothing

# Only in training: in eval, their graphs equal those of others.
OF_TRAINING = {"cosine", "rotation", "gumbel", "residual-dropout", "texture-fuse"}
OTHER_GRAPHS = {"residual-beam", "grouped-mixed", "multi-scale-refine"}
BOTH = REPRESENTATIVE - {"multi-scale"} | OTHER_GRAPHS  # its graph is part of that with `refine`


def of(names):
    chosen = {name: QUANTIZERS[name] for name in sorted(names)}
    chosen = {name: make for name, make in chosen.items() if waits_for_nothing(make())}
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen.keys())


def compare(make, training, backend):
    """Compares a compiled call and its backward pass with eager ones."""
    torch.compiler.reset()
    results = []
    for compiles in (True, False):
        torch.manual_seed(0)
        quantizer = make().train(training)
        call = torch.compile(quantizer, fullgraph=True, backend=backend) if compiles else quantizer
        x = draw(quantizer).requires_grad_()
        torch.manual_seed(1)
        out = train_step(call, x, draw_mask(quantizer))
        # A compiled graph returns zeros where eager returns no gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad
                     for p in quantizer.parameters()]  # fmt: skip
        results.append((out.quantized, out.indices, out.terms, x.grad, gradients))
    assert_close(*results)


@of(BOTH | OF_TRAINING)
def test_compiles_in_one_graph_in_training(make):
    compare(make, True, "aot_eager")


@of(BOTH)
def test_compiles_in_one_graph_in_eval(make):
    compare(make, False, "aot_eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by its imports
@pytest.mark.parametrize("name", ["euclidean", "residual"])
def test_inductor_computes_the_same(name):
    compare(QUANTIZERS[name], True, "inductor")


@pytest.mark.parametrize("name", ["euclidean", "residual-shared", "multi-scale"])
def test_rules_are_part_of_the_graph(name):
    torch.compiler.reset()
    found = []
    for compiles in (True, False):
        torch.manual_seed(0)
        quantizer = QUANTIZERS[name]()
        rules = [rule(quantizer) for rule in RULES.values()]

        def step(x, mask, quantizer=quantizer, rules=rules):
            out = quantizer(x, mask)
            for rule in rules:
                rule.step(out)
            return out.quantized

        call = torch.compile(step, fullgraph=True, backend="aot_eager") if compiles else step
        quantized = call(draw(quantizer), draw_mask(quantizer))
        found.append((quantized, [state(module) for module in (quantizer, *rules)]))
    assert_close(*found)


class Coded(nn.Module):
    """What TorchScript takes: tensors in, tensors out."""

    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x):
        out = self.quantizer(x)
        return out.quantized, out.indices, self.quantizer.decode(self.quantizer.encode(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@of(REPRESENTATIVE - {"require-finite", "texture"})
def test_traces_fit_other_batch_sizes(make):
    model = Coded(make().eval())
    traced = torch.jit.trace(model, draw(model.quantizer).requires_grad_())
    for size in (1, 77):
        x = draw(model.quantizer, (size,), seed=1)
        exactly(traced(x), model(x))


@of(BOTH)
def test_exports_with_a_free_batch_size(make):
    quantizer = make().eval()
    batch = torch.export.Dim("batch", min=2)
    inputs = (draw(quantizer), draw_mask(quantizer))
    program = torch.export.export(quantizer, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    inputs = (draw(quantizer, (77,), seed=1), draw_mask(quantizer, (77,)))
    exported, expected = program.module()(*inputs), quantizer(*inputs)
    exactly(exported.quantized, expected.quantized)
    exactly(exported.indices, expected.indices)
