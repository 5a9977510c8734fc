"""Compiles the kernels of `select_codes` for GPUs that need not be there; prints what they use.

A script for `test_triton_choice.py`, as `triton_compiled.py` is for the search.
"""

import itertools
import json
import sys

import torch
import triton

from tests.functional.triton_compiled import Device, compiled, used
from vqprior.functional._kernels._triton_choice import choose
from vqprior.functional._kernels._triton_choice_gradient import gradient

# (n, k, d): one load of features, two, many, and many with a rest; few codes; few rows; one code.
SIZES = [(99, 99, 5), (99, 9, 32), (9, 4096, 64), (99, 96, 64), (99, 99, 256), (99, 99, 100)]
SIZES += [(99, 1, 4), (1024, 8192, 64), (99, 96, 100), (99, 96, 4096)]

if __name__ == "__main__":
    for capability, dtype in itertools.product(map(int, sys.argv[1:]), [torch.float32, torch.half]):
        triton.runtime.driver.set_active(Device(capability))
        for n, k, d in SIZES:
            logits, codes, grad = (torch.zeros(s, dtype=dtype) for s in ((n, k), (k, d), (n, d)))
            indices = torch.zeros(n, dtype=torch.int64)
            calls = (choose, logits, codes), (gradient, grad, logits, codes, indices, 0.7)
            for function, *arguments in calls:
                for kernel in compiled(function, *arguments):
                    row = {"capability": capability, "dtype": str(dtype), "size": (n, k, d)}
                    name = kernel.metadata.name
                    print(json.dumps({"kernel": name, **row, **used(kernel)}))
