"""Buffers that must not lose digits when a module is cast."""

from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import Self


class KeepsDtypes(nn.Module):
    """A module whose own buffers keep their dtype under ``.half()``, ``.to(dtype)`` and the like.

    Statistics that are summed up over many steps would stop growing in half precision.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Moves devices as asked, and keeps dtypes."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
