"""Dtypes of devices, dtypes that casting must not change, and computation outside of autocast."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

_NOTHING = contextlib.nullcontext()
_WITHOUT_FLOAT64 = {"mps"}  # Apple GPUs


def widest_float(device: torch.device) -> torch.dtype:
    """Returns the widest floating-point dtype that a device has."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def to_float64(tensor: Tensor) -> Tensor:
    """Returns a tensor in float64, on the host if its device has none."""
    if widest_float(tensor.device) != torch.float64:
        tensor = tensor.cpu()
    return tensor.double()


class KeepsDtypes(nn.Module):
    """A module whose own buffers keep their dtype under ``.half()``, ``.to(dtype)`` and the like.

    In half precision, statistics summed over many steps would stop growing. Only a device without
    float64 turns such buffers into float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Moves buffers between devices, and keeps their dtypes."""
        before = dict(self._buffers)
        if any(old is not None and old.dtype == torch.float64 for old in before.values()):
            # Such a device raises when it is given a float64 tensor.
            widest = widest_float(fn(torch.empty(0)).device)
            if widest != torch.float64:
                for name, old in before.items():
                    if old is not None and old.dtype == torch.float64:
                        before[name] = self._buffers[name] = old.to(widest)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Returns a context in which autocast does nothing, also for the meta device.

    ``torch.autocast`` does not know that device. Entering it takes microseconds, so it is used only
    where autocast is enabled, or may be when a traced graph runs.
    """
    if device_type == "meta":
        return _NOTHING
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
