"""Dtypes that casting must not change, and computation outside of autocast."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

_NOTHING = contextlib.nullcontext()


class KeepsDtypes(nn.Module):
    """A module whose own buffers keep their dtype under ``.half()``, ``.to(dtype)`` and the like.

    In half precision, statistics summed over many steps would stop growing.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Moves buffers between devices, and keeps their dtypes."""
        before = dict(self._buffers)
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
