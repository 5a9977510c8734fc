"""Helpers that avoid the call overhead of custom operators and autograd functions."""

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def is_traced(*tensors: Tensor) -> bool:
    """Whether these tensors are being traced, so that a custom operator is needed.

    Otherwise callers call the function directly: dispatching a Python operator takes tens of
    microseconds, longer than a small search.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or any(type(tensor) is not Tensor for tensor in tensors)
    )


def with_signature(function: _Function) -> _Function:
    """Caches the signature of ``forward``, which torch would otherwise inspect in each call."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function
