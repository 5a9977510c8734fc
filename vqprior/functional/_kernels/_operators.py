"""Helpers that avoid the call overhead of custom operators and autograd functions."""

import functools
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqprior._transforms import is_transforming

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def is_traced(*tensors: Tensor) -> bool:
    """Whether tensors are traced, transformed or have no values: a custom operator is needed.

    Compilers and the transforms of ``torch.func`` cannot follow a search that writes into buffers.
    Otherwise callers call the function directly: dispatching a Python operator takes tens of
    microseconds, longer than a small search.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or is_transforming()
        or any(type(tensor) is not Tensor or tensor.is_meta for tensor in tensors)
    )


def batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Moves the batch dimension of ``vmap`` to the front, or adds it by repetition."""
    if dim is None:
        return tensor.unsqueeze(0).expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def apply(function: type[torch.autograd.Function], *inputs: object) -> Any:  # noqa: ANN401
    """Calls an autograd function, in forward mode with its ``tangent`` too.

    Dynamo refuses functions with a ``jvp``, so only the subclass for forward mode has one.
    """
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        function = _with_tangent(function)
    return function.apply(*inputs)


@functools.cache
def _with_tangent(function: Any) -> Any:  # noqa: ANN401
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ANN401
        function.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*(one for one in inputs if one is None or isinstance(one, Tensor)))

    methods = {"jvp": function.tangent, "setup_context": staticmethod(setup_context)}
    return type(function.__name__, (function,), methods)


def with_signature(function: _Function) -> _Function:
    """Caches the signature of ``forward``, which torch would otherwise inspect in each call."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function
