"""Compiles the kernels of `FSQ` for GPUs that need not be there; prints what each uses, as JSON."""

import itertools
import json
import sys

import torch
import triton

from tests.functional.triton_compiled import Device, compiled, used
from vqprior.functional._kernels._triton_levels import levels_gradient, round_to_levels


def calls(dtype, d):
    x, strides = torch.zeros(99, d, dtype=dtype), torch.ones(d).long()
    bounds, indices = torch.ones(7, d), torch.zeros(99).long()
    for mask, symmetric in itertools.product([None, indices == 0], [False, True]):
        yield round_to_levels, (x, mask, bounds, strides, symmetric)
    yield levels_gradient, (x, x, indices, bounds)


if __name__ == "__main__":
    dtypes = [torch.float32, torch.half, torch.bfloat16]
    for capability, dtype, d in itertools.product(map(int, sys.argv[1:]), dtypes, [1, 4, 39, 62]):
        triton.runtime.driver.set_active(Device(capability))
        for function, arguments in calls(dtype, d):
            for kernel in compiled(function, *arguments):
                row = {"capability": capability, "dtype": str(dtype), "d": d}
                print(json.dumps({"function": function.__name__, **row, **used(kernel)}))
