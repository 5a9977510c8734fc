"""The first of the largest entries of each row."""

import torch
from torch import Tensor

from vqprior.functional._kernels._host import is_on_host

_READABLE = frozenset({torch.float32, torch.float64})
_WIDENED = frozenset({torch.float16, torch.bfloat16})
# On one thread numpy's arg-max, which is vectorized, is six times as fast as torch's, which takes
# all threads where there is more than a block of entries.
_SPEED_OF_NUMPY = 6
_FEW = 1 << 20


def first_argmax(scores: Tensor) -> Tensor:
    """Returns the first index of the largest entry, or of NaN: ``(..., k) -> (...)``.

    Reads eager tensors on the CPU by numpy where it is faster, unless an active mode, such as a
    tracer, has to see every operator.
    """
    few = scores.numel() <= _FEW
    if (
        is_on_host(scores)
        and (few or torch.get_num_threads() <= _SPEED_OF_NUMPY)
        and (scores.dtype in _READABLE or (few and scores.dtype in _WIDENED))
        and torch._C._len_torch_dispatch_stack() == 0
    ):
        readable = scores.float() if scores.dtype in _WIDENED else scores
        return torch.as_tensor(readable.numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)
