"""Compiles what calls would launch on GPUs that need not be there; prints what each uses, as JSON.

A script for `test_triton.py`, which asserts; by hand, it tells what a change of the plan costs.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vqprior.functional._kernels._triton_averages import Step
from vqprior.functional._kernels._triton_revival import Revival
from vqprior.functional._kernels._triton_search import nearest_codes
from vqprior.functional._kernels._triton_statistics import add_statistics_

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# (n, k, d): one load of features, two, many, and many with a rest; few codes; few vectors.
SIZES = [(99, 99, 5), (99, 9, 32), (9, 99, 64), (99, 99, 64), (99, 99, 256), (99, 99, 100)]


class Device:
    """What Triton asks of a driver in order to compile: the device's number is its capability."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def compiled(function, *arguments):
    """The kernels that a call launches: compiled with the types and constants of the call."""
    launch, found = JITFunction.run, []

    def record(self, *args, warmup, **options):
        found.append(launch(self, *args, warmup=True, **options))

    JITFunction.run = record
    try:
        function(*arguments)
    finally:
        JITFunction.run = launch
    return found


def used(kernel):
    """Registers, bytes of stack (where they spill to) and of shared memory, and tensor cores."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = dict(word.split(":", 1) for word in text.split() if ":" in word)
    return {
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]),
        "shared": kernel.metadata.shared,
        "tensor_cores": "mma" in kernel.asm["ptx"],
    }


def nearest(x, codes):
    nearest_codes(x, codes, euclidean=True, scale=None)


def calls(dtype):
    for n, k, d in SIZES:
        x, keys = torch.zeros(1, n, d, dtype=dtype), torch.zeros(1, k, d)
        yield nearest, (n, k, d), (x, keys.to(dtype))
        yield add_statistics_, (n, k, d), (torch.zeros(k, d + 1), x[0], torch.zeros(n).long())
        yield move_averages, (n, k, d), (keys[0].to(dtype),)
        yield revive, (n, k, d), (keys[0].to(dtype), x[0])


def move_averages(weight):
    step = Step([weight], [(weight.float(), weight.float(), *torch.zeros(2, len(weight)))], 1.0, 1)
    step.move_(0.9, 1e-5)


def revive(weight, x):
    zero, indices = torch.zeros(()), torch.zeros(len(x)).long()
    revival = Revival(
        weight=weight,
        gain=1.0,
        uses=torch.zeros(len(weight)),
        tokens=zero,
        steps=zero.long(),
        windows=zero.long(),
        seed=3,
        threshold=0.1,
        patience=2.0,
    )
    revival.step_(x, x, indices, indices > 0)


if __name__ == "__main__":
    for capability, dtype in itertools.product(map(int, sys.argv[1:]), [torch.float32, torch.half]):
        triton.runtime.driver.set_active(Device(capability))
        for function, size, arguments in calls(dtype):
            for kernel in compiled(function, *arguments):
                row = {"capability": capability, "dtype": str(dtype), "size": size}
                print(json.dumps({"function": function.__name__, **row, **used(kernel)}))
