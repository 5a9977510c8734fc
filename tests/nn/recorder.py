"""Records the operators of a call: an exact, untimed account of its copies."""

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What moves numbers without computing any. Views are none of these.
COPIES = {
    "_to_copy",
    "cat",
    "clone",
    "constant_pad_nd",
    "copy_",
    "index",
    "index_select",
    "roll",
    "stack",
}


class Recorder(TorchDispatchMode):
    """Keeps each operator's name, arguments and result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func._schema.name.removeprefix("aten::"), args, result))
        return result


def copies_of(call, like):
    """The operators by which ``call`` copied a tensor as large as ``like``: how often each."""
    with Recorder() as recorder:
        call()
    return dict(
        Counter(
            name
            for name, _, result in recorder.calls
            if name in COPIES and isinstance(result, Tensor) and result.numel() >= like.numel()
        )
    )
