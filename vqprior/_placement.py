"""Base class of modules that know their dtype, and whose constants follow them between devices."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from vqprior._precision import KeepsDtypes
from vqprior._transforms import is_transforming


class Placed(nn.Module):
    """A module that knows the dtype it was cast to, and may hold constants.

    A constant is a tensor that the arguments of the constructor determine. As a buffer outside of
    the ``state_dict`` it would be lost where a module is built on the meta device and then
    materialized: nothing brings its values back. It is an attribute instead, which has values
    from the start, follows the module between devices and keeps its dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cast_dtype = torch.get_default_dtype()
        self._constants: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Moves constants to where ``fn`` moves tensors, and remembers the dtype it casts to."""
        super()._apply(fn, recurse)
        # What `fn` returns has the right place but not always values: `to_empty` makes new tensors.
        placed = fn(torch.empty(0, dtype=self._cast_dtype, device=self._place()))
        if placed.is_floating_point():
            self._cast_dtype = placed.dtype
        if placed.device.type != "meta":
            for name in self._constants:
                setattr(self, name, _moved(getattr(self, name), placed.device))
        return self

    def _set_constant(self, name: str, make: Callable[[], Tensor]) -> None:
        """Sets an attribute to what ``make`` returns, with values even if built on meta."""
        here = torch.empty(0).device
        with torch.inference_mode(mode=False), torch.device("cpu"):
            constant = make()
        setattr(self, name, constant if here.type == "meta" else _moved(constant, here))
        self._constants += (name,)

    def _constant(self, name: str, device: torch.device) -> Tensor:
        """Returns a constant on ``device``, and keeps it there for the next call.

        It lies elsewhere if the parameters were replaced instead of moved, as by
        ``load_state_dict(assign=True)``.
        """
        constant: Tensor = getattr(self, name)
        if constant.device == device:
            return constant
        # Tensors that a compiler or a transform is at work with must not be kept.
        if device.type == "meta" or torch.compiler.is_compiling() or is_transforming():
            return constant.to(device)
        constant = _moved(constant, device)
        setattr(self, name, constant)
        return constant

    def _place(self) -> torch.device:
        """Returns the device of the constants; the CPU if there are none."""
        return next((getattr(self, name).device for name in self._constants), torch.device("cpu"))


def module_dtype(module: Placed) -> torch.dtype:
    """Returns the widest dtype of a module's floating parameters and buffers.

    Without any, that to which the module was cast last. Buffers that keep their dtype do not
    count.
    """
    found: torch.dtype | None = None
    for part in module.modules():
        if isinstance(part, KeepsDtypes):
            continue
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is None or tensor.dtype is found or not tensor.is_floating_point():
                continue
            found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
    return module._cast_dtype if found is None else found


def _moved(constant: Tensor, device: torch.device) -> Tensor:
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(mode=False):
        return constant.to(device)
