"""Base class of modules whose buffers keep their dtype."""

from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import Self


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
