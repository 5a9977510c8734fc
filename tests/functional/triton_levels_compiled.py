"""Compiles the kernels of `FSQ`, `LFQ` and `BSQ` for GPUs that need not be there; prints JSON."""

import itertools
import json
import sys

import torch
import triton

from tests.functional.triton_compiled import Device, compiled, used
from vqprior.functional._kernels._bit_plan import BitPlan
from vqprior.functional._kernels._triton_bits import bit_losses, bits_gradient, sign_bits
from vqprior.functional._kernels._triton_levels import levels_gradient, round_to_levels


def levels(dtype):
    for d in (4, 62):
        x, strides = torch.zeros(99, d, dtype=dtype), torch.ones(d).long()
        bounds, indices = torch.ones(7, d), torch.zeros(99).long()
        for mask, symmetric in itertools.product([None, indices == 0], [False, True]):
            yield round_to_levels, (x, mask, bounds, strides, symmetric)
        yield levels_gradient, (x, x, indices, bounds)


def bits(dtype):
    for d, group, sphere in [(12, 9, False), (20, 10, True)]:
        options = {"scale": 1.0, "factor": 1.0, "weights": (1.0, 1.0, 1.0), "sphere": sphere}
        plan = BitPlan(bits=d, group=min(d, group), **options)
        x, indices = torch.zeros(99, d, dtype=dtype), torch.zeros(99).long()
        sums, scalar = torch.zeros(4 + 2**20), torch.ones(())
        yield sign_bits, (x, indices == 0, plan)
        yield bit_losses, (sums, plan)
        yield bits_gradient, (x, indices, sums, sums, (x, scalar, scalar), plan)


if __name__ == "__main__":
    dtypes = [torch.float32, torch.half]
    for capability, dtype in itertools.product(map(int, sys.argv[1:]), dtypes):
        triton.runtime.driver.set_active(Device(capability))
        for function, arguments in itertools.chain(levels(dtype), bits(dtype)):
            for kernel in compiled(function, *arguments):
                row = {"capability": capability, "dtype": str(dtype)}
                print(json.dumps({"function": function.__name__, **row, **used(kernel)}))
