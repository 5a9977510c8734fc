"""Codebooks that a rule writes to and a quantizer owns."""

import weakref
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import nn

from vqprior import _distributed

_Codebook = TypeVar("_Codebook", bound=nn.Module)


class BorrowedCodebooks(Generic[_Codebook]):
    """Refers to codebooks without keeping them alive, and checks that they can be written to.

    A copy that one ``deepcopy`` or ``pickle`` makes of rule and quantizer, in any order, refers to
    the codebooks of the copied quantizer. In a copy made without the quantizer nothing else holds
    the copied codebooks. They are gone once it is complete, and ``get`` raises instead of
    returning codebooks that no quantizer uses.
    """

    def __init__(self, codebooks: tuple[_Codebook, ...]) -> None:
        self._references = tuple(weakref.ref(codebook) for codebook in codebooks)
        self._shapes = tuple(_shapes(codebook) for codebook in codebooks)
        self._checked: tuple[object, ...] = ()

    def __len__(self) -> int:
        return len(self._references)

    def __reduce__(self) -> tuple[type, tuple[tuple[_Codebook, ...]]]:
        """Copies the codebooks along; whoever owns them in the copy keeps them alive."""
        return BorrowedCodebooks, (self.get(),)

    def get(self) -> tuple[_Codebook, ...]:
        """Returns the codebooks.

        Raises:
            RuntimeError: If one no longer exists.
        """
        found = [reference() for reference in self._references]
        codebooks = tuple(codebook for codebook in found if codebook is not None)
        if len(codebooks) < len(found):
            raise RuntimeError(
                "`quantizer` must exist as long as its rule, got a rule whose codebook is gone. "
                "Copy both at once, as in `copy.deepcopy((quantizer, rule))`, or build a rule on "
                "the copied quantizer and load the state of the old rule."
            )
        return codebooks

    def check_whole(self) -> None:
        """Raises ``TypeError`` if a codebook is sharded over ranks. Reads no tensor."""
        codebooks = self.get()
        if not torch.compiler.is_compiling():
            # The same tensors as in the last step: to walk through modules costs more than a step
            # of a small codebook.
            now = tuple(_identity(codebook) for codebook in codebooks)
            if now == self._checked:
                return
        for codebook, before in zip(codebooks, self._shapes, strict=True):
            _distributed.check_whole(codebook)
            if _shapes(codebook) != before:
                raise TypeError(
                    "`codebook` must be whole on every rank to be written to, got "
                    f"{_listed(_shapes(codebook))} instead of {_listed(before)}. "
                    "Use `default_rules`, built before sharding, which turn the codebook into "
                    "buffers."
                )
        if not torch.compiler.is_compiling():
            self._checked = now


def _identity(codebook: nn.Module) -> object:
    """Returns what tells whether a codebook still consists of the same tensors."""
    if codebook._modules:
        return object()  # equal to nothing
    tensors = [*codebook._parameters.values(), *codebook._buffers.values()]
    return [(id(one), type(one), None if one is None else one.shape) for one in tensors]


def _shapes(codebook: nn.Module) -> dict[str, torch.Size]:
    """Returns the shape of each parameter and buffer; ``CodebookEMA`` turns one into the other."""
    named = chain(codebook.named_parameters(), codebook.named_buffers())
    return {name: tensor.shape for name, tensor in named}


def _listed(shapes: dict[str, torch.Size]) -> str:
    tensors = [f"`{name}` of shape {tuple(shape)}" for name, shape in shapes.items()]
    return ", ".join(tensors) if tensors else "no tensor"
