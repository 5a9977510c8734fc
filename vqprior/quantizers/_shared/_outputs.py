"""Results: put together, merged, and with another value."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vqprior._interfaces import QuantizerOutput, Selection


def make_output(
    quantized: Tensor,
    indices: Tensor,
    terms: dict[str, Tensor],
    selections: Iterable[Selection] = (),
) -> QuantizerOutput:
    """Puts the result of a quantizer together; the loss is the sum of the terms.

    For quantizers of your own: ``forward`` and ``quantize_as`` end with it.

    Args:
        quantized: The codes, in the dtype of the input, with the gradient of the estimator and
            zeros where a token is not valid.
        indices: ``int64``, -1 where a token is not valid.
        terms: Weighted scalars by name; only those that can act.
        selections: One for each of the quantizer's ``codebooks``, in the same order.

    Returns:
        The result, with terms and loss in float32.

    Shape:
        - ``quantized``: ``(..., d)``
        - ``indices``: ``(...)`` or ``(..., q)``

    Examples:
        >>> import torch
        >>> from vqprior import make_output
        >>> terms = {"commitment": torch.tensor(0.5), "entropy": torch.tensor(-0.25)}
        >>> make_output(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), terms).loss
        tensor(0.2500)
    """
    terms = {name: term.float() for name, term in terms.items()}
    zero = torch.zeros((), dtype=torch.float32, device=quantized.device)
    return QuantizerOutput(
        quantized=quantized,
        indices=indices,
        loss=sum(terms.values(), zero),
        terms=terms,
        selections=tuple(selections),
    )


def replace_quantized(out: QuantizerOutput, quantized: Tensor) -> QuantizerOutput:
    """Returns ``out`` with another value; `dataclasses.replace` breaks the graph of torch 2.6."""
    return QuantizerOutput(
        quantized=quantized,
        indices=out.indices,
        loss=out.loss,
        terms=out.terms,
        selections=out.selections,
    )


def merge_outputs(
    outs: list[QuantizerOutput], quantized: Tensor, indices: Tensor
) -> QuantizerOutput:
    """Joins the results of several quantizers; terms of the same name add up."""
    terms: dict[str, Tensor] = {}
    for out in outs:
        for name, term in out.terms.items():
            terms[name] = terms[name] + term if name in terms else term
    return make_output(quantized, indices, terms, (s for out in outs for s in out.selections))


def code_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a module adds up codes: float32, or wider if its tensors are."""
    dtype = torch.float32
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
