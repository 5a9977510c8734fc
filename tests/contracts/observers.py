"""Dispatch modes that observe every operator of a call."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that read a value from the device, or whose output size depends on one.
_SYNCHRONIZING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest result."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view shares memory that was counted already, and may repeat it (`expand`).
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                entries = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.numel = max(self.numel, entries)
        return result


class LargeTensors(TorchDispatchMode):
    """Collects, and keeps alive, the storages of new results with at least ``numel`` entries."""

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs))
                 if isinstance(leaf, torch.Tensor)}  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.numel:
                storage = leaf.untyped_storage()
                if storage._cdata not in known:
                    self.storages[storage._cdata] = storage
        return result


class NoHostSync(TorchDispatchMode):
    """Fails at operators that make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in _SYNCHRONIZING, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype not in (torch.bool, torch.uint8) for i in indices), name
        return func(*args, **(kwargs or {}))
