"""What ``torch.func`` hides: inside ``grad``, ``jvp`` and ``vmap`` a tensor is a wrapper."""

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def is_transforming() -> bool:
    """Whether the caller runs inside a transform of ``torch.func``, compiled or not."""
    return torch._C._are_functorch_transforms_active()


def unwrap(tensor: Tensor) -> Tensor:
    """Returns the tensor behind the wrappers, with the values of the whole batch of ``vmap``."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_learning(tensor: Tensor) -> bool:
    """Whether a gradient or a tangent of this tensor is asked for, at any level of transforms.

    Inside ``vmap``, ``requires_grad`` is False for what an outer ``grad`` differentiates; inside
    ``jvp`` it is False for everything. The compiler cannot tell: there everything may learn.
    """
    if tensor.requires_grad or not is_transforming():
        return tensor.requires_grad
    return torch.compiler.is_compiling() or any(
        layer.requires_grad or forward_ad.unpack_dual(layer).tangent is not None
        for layer in _layers(tensor)
    )


def with_batch_of(x: Tensor, result: Tensor) -> Tensor:
    """Gives the result of an autograd function the batch dimension of its input ``x``.

    If ``vmap`` maps over ``x`` alone and the value does not depend on it, torch would take the
    result for one that all samples share, and add up their gradients.
    """
    if not is_transforming():
        return result
    return torch.where(torch.ones_like(x, dtype=torch.bool), result, x.to(result.dtype))


def _layers(tensor: Tensor) -> list[Tensor]:
    """Returns the tensor and all that it wraps, from the outside in."""
    layers = [tensor]
    while _functorch.is_functorch_wrapped_tensor(layers[-1]):
        layers.append(_functorch.get_unwrapped(layers[-1]))
    return layers
