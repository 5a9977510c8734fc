"""Operators that compilers do not look into, and what they cost where nobody compiles."""

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def is_traced(*tensors: Tensor) -> bool:
    """Whether a graph is made of these tensors, in which one operator is to stand.

    Elsewhere the function behind it is called: to dispatch an operator that is written in Python
    takes tens of microseconds, longer than a small search.
    """
    return torch.compiler.is_compiling() or any(type(tensor) is not Tensor for tensor in tensors)


def with_signature(function: _Function) -> _Function:
    """Keeps the signature of ``forward``, which torch finds out anew in each call."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function
