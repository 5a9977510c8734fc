"""Helpers that build, change and merge results."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vqprior._interfaces import Quantizer
from vqprior._results import QuantizerOutput, Selection


def make_output(
    quantized: Tensor,
    indices: Tensor,
    terms: dict[str, Tensor],
    selections: Iterable[Selection] = (),
) -> QuantizerOutput:
    """Builds the result of a quantizer; ``loss`` is the sum of ``terms``.

    Call it last in ``forward`` and ``quantize_as`` of a custom quantizer.

    Args:
        quantized: The codes, in the dtype of the input, with the gradient of the estimator, and
            zeros for invalid tokens.
        indices: The indices as ``int64``, -1 for invalid tokens.
        terms: Weighted scalar losses by name; leave out those with a weight of 0.
        selections: One for each of the quantizer's ``codebooks``, in the same order.

    Returns:
        The result, with ``terms`` and ``loss`` in float32.

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
    losses = iter(terms.values())
    first = next(losses, None)
    if first is None:
        first = torch.zeros((), dtype=torch.float32, device=quantized.device)
    return QuantizerOutput(
        quantized=quantized,
        indices=indices,
        loss=sum(losses, first),
        terms=terms,
        selections=tuple(selections),
    )


def replace_quantized(out: QuantizerOutput, quantized: Tensor) -> QuantizerOutput:
    """Returns ``out`` with another ``quantized``."""
    # `dataclasses.replace` breaks the graph in torch 2.6.
    return QuantizerOutput(
        quantized=quantized,
        indices=out.indices,
        loss=out.loss,
        terms=out.terms,
        selections=out.selections,
    )


def merge_outputs(
    outs: list[QuantizerOutput], quantized: Tensor, indices: Tensor, *, weight: float = 1.0
) -> QuantizerOutput:
    """Joins the results of several quantizers; terms of the same name are summed and weighted."""
    terms: dict[str, Tensor] = {}
    for out in outs:
        for name, term in out.terms.items():
            terms[name] = terms[name] + term if name in terms else term
    if weight != 1.0:
        terms = {name: weight * term for name, term in terms.items()}
    return make_output(quantized, indices, terms, (s for out in outs for s in out.selections))


def code_dtype(quantizer: Quantizer) -> torch.dtype:
    """Returns the dtype in which a quantizer sums codes: float32, or wider if its own is."""
    return torch.promote_types(quantizer.dtype, torch.float32)
