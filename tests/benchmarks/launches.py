"""Counts what one step launches: on a GPU, launches by the host are what a small step costs.

    python -m tests.benchmarks.launches             # on the path of a CPU
    python -m tests.benchmarks.launches --gpu       # on that of a GPU, which is not needed
    python -m tests.benchmarks.launches --names     # which operators

An operator counts unless it returns no tensor, only makes a view or only allocates. On the path of
a GPU, Triton's interpreter runs the kernels on the CPU, and each counts once.
"""

import argparse
import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    CodebookEMA,
    CodebookRevival,
    ResidualQuantizer,
    VectorQuantizer,
)
from vqprior.functional import select_codes
from vqprior.functional._kernels import _triton

NUM_TOKENS, NUM_CODES, DIM = 256, 512, 64
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Counts operators and kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _ALLOCATIONS and _makes_numbers(func):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def _makes_numbers(func: torch._ops.OpOverload) -> bool:
    aliases = [value.alias_info for value in func._schema.returns if "Tensor" in str(value.type)]
    return any(alias is None or alias.is_write for alias in aliases)


@contextlib.contextmanager
def launches(*, gpu: bool = False) -> Iterator[Launches]:
    """Counts within a block; ``gpu`` needs ``TRITON_INTERPRET=1`` from the start of the process."""
    counting = Launches()
    with contextlib.ExitStack() as stack:
        if gpu:
            from triton.runtime import interpreter

            run = interpreter.InterpretedFunction.run

            @functools.wraps(run)
            def counted(kernel, *args, **options):
                counting.names[f"kernel {kernel.fn.__name__}"] += 1
                with _disable_current_modes():
                    return run(kernel, *args, **options)

            stack.enter_context(mock.patch.object(interpreter.InterpretedFunction, "run", counted))
            stack.enter_context(mock.patch.object(_triton, "is_usable", return_value=True))
            # Nor does the code read values as it may on a CPU.
            stack.enter_context(mock.patch.object(torch.Tensor, "is_cpu", False))
        yield stack.enter_context(counting)


def training(make: Callable[[], nn.Module], *rules: Callable[[nn.Module], object]) -> Callable:
    """Returns a step: forward, backward from the result and the loss, and the rules."""
    quantizer = make().train()
    steps = [rule(quantizer) for rule in rules]
    x = torch.randn(NUM_TOKENS, quantizer.dim, requires_grad=True)
    direction = torch.randn_like(x)

    def step() -> None:
        out = quantizer(x)
        wanted = [out.quantized, out.loss] if out.loss.requires_grad else [out.quantized]
        torch.autograd.backward(wanted, [direction, None][: len(wanted)])
        for rule in steps:
            rule.step(out)
        x.grad = None
        for parameter in quantizer.parameters():
            parameter.grad = None

    return step


def plain() -> VectorQuantizer:
    return VectorQuantizer(DIM, NUM_CODES)


def evaluation(call: Callable[[nn.Module, torch.Tensor], object]) -> Callable:
    """Returns a call in eval, without gradients."""
    quantizer, x = plain().eval(), torch.randn(NUM_TOKENS, DIM)
    return torch.no_grad()(lambda: call(quantizer, x))


def selection() -> Callable:
    logits = torch.randn(NUM_TOKENS, NUM_CODES, requires_grad=True)
    codes, direction = torch.randn(NUM_CODES, DIM), torch.randn(NUM_TOKENS, DIM)

    def step() -> None:
        vectors, _ = select_codes(logits, codes)
        vectors.backward(direction)
        logits.grad = None

    return step


# What each step is, and how many launches it may take on the path of a CPU and of a GPU.
STEPS: dict[str, tuple[Callable[[], Callable], int, int]] = {
    "VectorQuantizer": (lambda: training(plain), 46, 87),
    "and CodebookEMA": (lambda: training(plain, CodebookEMA), 36, 47),
    "and CodebookRevival": (lambda: training(plain, CodebookEMA, CodebookRevival), 65, 52),
    "eval": (lambda: evaluation(lambda quantizer, x: quantizer(x)), 22, 30),
    "encode": (lambda: evaluation(lambda quantizer, x: quantizer.encode(x)), 12, 11),
    "ResidualQuantizer of 8 and CodebookEMA": (
        lambda: training(lambda: ResidualQuantizer([plain() for _ in range(8)]), CodebookEMA),
        300,
        413,
    ),
    "FSQ": (lambda: training(lambda: FSQ([8, 5, 5, 5])), 20, 3),
    "LFQ of 12 bits": (lambda: training(lambda: LFQ(12)), 50, 8),
    "BSQ of 12 bits": (lambda: training(lambda: BSQ(12)), 55, 7),
    "select_codes": (selection, 10, 4),
}


def count(name: str, *, gpu: bool = False) -> Counter[str]:
    """Counts the launches of a step that has run before."""
    step = STEPS[name][0]()
    with launches(gpu=gpu):
        step()
    with launches(gpu=gpu) as counting:
        step()
    return counting.names


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.launches")
    parser.add_argument("--gpu", action="store_true", help="count the path of a GPU")
    parser.add_argument("--names", action="store_true", help="print the operators")
    options = parser.parse_args()
    if options.gpu and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
    for name, (_, on_cpu, on_gpu) in STEPS.items():
        names = count(name, gpu=options.gpu)
        most = on_gpu if options.gpu else on_cpu
        print(f"{name:40} {names.total():5} of at most {most}")
        if options.names:
            print("   ", ", ".join(f"{number} {name}" for name, number in names.most_common()))


if __name__ == "__main__":
    main()
