"""What a quantizer returns."""

import dataclasses
import warnings
from typing import NoReturn

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Selection:
    """Per-codebook record of a call, used by rules, losses and metrics.

    Attributes:
        inputs: The vectors that were compared with the codes, after any projection or residual;
            gradients flow back to what produced them. Zeros where ``mask`` is False.
        codes: The chosen codes; gradients flow to the codebook and not to ``inputs``. Zeros
            where ``mask`` is False.
        indices: Which codes were chosen, as ``int64``; -1 where ``mask`` is False.
        mask: True for tokens that count: not masked by the caller, and all features finite.

    Shape:
        - ``inputs``, ``codes``: ``(..., d)``
        - ``indices``, ``mask``: ``(...)``
    """

    inputs: Tensor
    codes: Tensor
    indices: Tensor
    mask: Tensor

    def detach(self) -> "Selection":
        """Returns the same without gradients, which keep what computed them alive."""
        return Selection(
            inputs=self.inputs.detach(),
            codes=self.codes.detach(),
            indices=self.indices,
            mask=self.mask,
        )

    def __repr__(self) -> str:
        """Shows dtypes and shapes."""
        return f"Selection({', '.join(_fields(self))})"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QuantizerOutput:
    """What every quantizer returns, whatever its options or mode.

    Attributes:
        quantized: The chosen codes in the dtype of the input, with the gradient that the
            estimator defines. Zeros where a token is masked.
        indices: Which codes were chosen, as ``int64``; -1 where a token is masked or dropped.
        loss: The sum of ``terms``, a float32 scalar.
        terms: Weighted float32 scalars by name (``"commitment"``, ``"codebook"``, ...); only
            those that can act.
        selections: One for each entry of the quantizer's ``codebooks``, in the same order.

    Shape:
        - ``quantized``: ``(..., d)``
        - ``indices``: ``(...)``, or ``(..., q)`` for ``q`` codebooks

    Examples:
        >>> import torch
        >>> from vqprior import FSQ
        >>> FSQ([8, 5, 5])(torch.zeros(2, 100, 3))
        QuantizerOutput(
            quantized=float32 (2, 100, 3),
            indices=int64 (2, 100),
            loss=0,
            terms={},
            selections=(),
        )
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    terms: dict[str, Tensor]
    selections: tuple[Selection, ...]

    def detach(self) -> "QuantizerOutput":
        """Returns the same without gradients.

        To keep results of micro-batches for one ``rule.step(*outs)`` without the activations of
        the whole model.
        """
        return QuantizerOutput(
            quantized=self.quantized.detach(),
            indices=self.indices,
            loss=self.loss.detach(),
            terms={name: term.detach() for name, term in self.terms.items()},
            selections=tuple(selection.detach() for selection in self.selections),
        )

    def __iter__(self) -> NoReturn:
        """Raises: a result has fields.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "`out` must be read by its fields, such as `out.quantized` and `out.loss`, got an "
            "attempt to unpack it. `nn.DataParallel` unpacks results: use "
            "`DistributedDataParallel`."
        )

    def __repr__(self) -> str:
        """Shows dtypes, shapes and the values of the terms, one field a line."""
        return f"QuantizerOutput(\n{''.join(f'    {field},{chr(10)}' for field in _fields(self))})"


# Lets torch.export and torch.utils._pytree see inside the results.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.6 warns of what it does itself
    torch.export.register_dataclass(Selection)
    torch.export.register_dataclass(QuantizerOutput)


def _fields(result: Selection | QuantizerOutput) -> list[str]:
    names = [field.name for field in dataclasses.fields(result)]
    return [f"{name}={_brief(getattr(result, name))}" for name in names]


def _brief(value: object) -> str:
    """Returns ``value`` as its dtype and shape, or its number if it is a scalar."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_brief(part)}" for name, part in value.items()) + "}"
    if isinstance(value, tuple) and value and isinstance(value[0], Selection):
        shapes = ", ".join(str(tuple(part.inputs.shape)) for part in value)
        return f"<{len(value)} with inputs of {shapes}>"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.dim() == 0:
        try:
            return f"{value.item():.4g}"
        except RuntimeError:  # without a value: on the meta device, or while being traced
            pass
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
