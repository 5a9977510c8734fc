"""Memory of intermediate results, used again where nobody else will look at them."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from vqprior.nn._normalization import ChannelNorm

# These return new memory. Subclasses may not, nor may layers whose class a parametrization changed.
_MAKES_ANEW = (nn.Conv2d, nn.GroupNorm, nn.Linear, ChannelNorm)


def may_overwrite(maker: nn.Module, *around: nn.Module) -> bool:
    """Whether what ``maker`` has just returned, by way of the modules ``around`` it, is ours alone.

    That takes a layer that makes it anew, no gradient that will ask for it, and no hook that may
    have kept it. Large new tensors cost more than the arithmetic on them: their pages have to be
    found and cleared.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(maker) in _MAKES_ANEW
        and not any(m._forward_hooks or "forward" in vars(m) for m in (maker, *around))
        and not _hooks._global_forward_hooks
    )


def add(made: Tensor, other: Tensor, maker: nn.Module, *around: nn.Module) -> Tensor:
    """Returns ``made + other``, in the memory of ``made`` if ``maker`` made it for us alone."""
    if may_overwrite(maker, *around) and made.dtype == other.dtype:
        return made.add_(other)
    return made + other
