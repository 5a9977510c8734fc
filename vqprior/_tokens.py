"""What every quantizer does with its tokens: admit them, and put a result together."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vqprior._checks import (
    check_floating,
    check_index_range,
    check_integer,
    check_last_dim,
    check_mask,
    check_shape,
)
from vqprior._interfaces import Quantizer, QuantizerOutput, Selection


def check_quantizer(name: str, quantizer: object) -> None:
    """Raises ``TypeError`` unless ``quantizer`` is one of a single tensor."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"`{name}` must be a quantizer, got {type(quantizer).__name__}. A `TextureQuantizer` "
            "goes outside of all others."
        )


def check_features_last(name: str, quantizer: Quantizer) -> None:
    """Raises unless ``quantizer`` is one with features last."""
    check_quantizer(name, quantizer)
    if not quantizer.features_last:
        raise ValueError(
            f"`{name}` must have features last, got {type(quantizer).__name__}. Put `ChannelFirst` "
            "outside."
        )


def check_tokenwise(name: str, quantizer: Quantizer) -> None:
    """Raises unless ``quantizer`` has features last, and indices for each token."""
    check_features_last(name, quantizer)
    if not quantizer.tokenwise:
        raise ValueError(
            f"`{name}` must have indices for each token, got {type(quantizer).__name__}. Put "
            "`MultiScale` outside."
        )


def which_count(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Checks the input; returns which tokens count: not masked, and finite."""
    check_floating("x", x)
    check_last_dim("x", x, dim)
    # Two plain passes; `isfinite` takes three, and the reduction of booleans is slow.
    counted = (x.amax(dim=-1) < torch.inf) & (x.amin(dim=-1) > -torch.inf)
    if mask is not None:
        check_mask(mask, x.shape[:-1])
        counted = counted & mask
    return counted


def admit(x: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Checks the input; returns it with zeros where it does not count, and where it does."""
    counted = which_count(x, mask, dim)
    return torch.where(counted.unsqueeze(-1), x, 0.0), counted


def admit_assigned(
    x: Tensor, indices: Tensor, dim: int, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """As ``admit``, for tokens whose ``indices`` were chosen elsewhere."""
    check_floating("x", x)
    check_last_dim("x", x, dim)
    check_indices(indices, len(sizes))
    check_shape(
        "indices", indices, x.shape[:-1] if len(sizes) == 1 else (*x.shape[:-1], len(sizes))
    )
    for column, size in zip(
        [indices] if len(sizes) == 1 else indices.unbind(-1), sizes, strict=True
    ):
        check_index_range("indices", column, size)
    return admit(x, is_named(indices, len(sizes)), dim)


def check_indices(indices: Tensor, num_codebooks: int) -> None:
    """Raises unless ``indices`` are integers ``(...)``, or ``(..., q)`` for ``q`` codebooks."""
    check_integer("indices", indices)
    if num_codebooks > 1 and (indices.ndim == 0 or indices.shape[-1] != num_codebooks):
        raise ValueError(
            f"`indices` must have shape (..., {num_codebooks}), an index for each codebook, got "
            f"{tuple(indices.shape)}. Fill up with -1 what is not known."
        )


def is_named(indices: Tensor, num_codebooks: int) -> Tensor:
    """Which tokens have at least one index that names a code: ``(...)``."""
    named = indices >= 0
    return named if num_codebooks == 1 else named.any(dim=-1)


def leave_out(indices: Tensor, counted: Tensor, num_codebooks: int) -> Tensor:
    """``indices`` with -1 for tokens that do not count, as ``int64``."""
    kept = counted if num_codebooks == 1 else counted.unsqueeze(-1)
    return torch.where(kept, indices.long(), -1)


def code_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a module adds up codes: float32, or wider if its tensors are."""
    dtype = torch.float32
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def result(
    quantized: Tensor,
    indices: Tensor,
    terms: dict[str, Tensor],
    selections: Iterable[Selection] = (),
) -> QuantizerOutput:
    """Puts a result together; the loss is the sum of the terms."""
    terms = {name: term.float() for name, term in terms.items()}
    zero = torch.zeros((), dtype=torch.float32, device=quantized.device)
    return QuantizerOutput(
        quantized=quantized,
        indices=indices,
        loss=sum(terms.values(), zero),
        terms=terms,
        selections=tuple(selections),
    )


def with_quantized(out: QuantizerOutput, quantized: Tensor) -> QuantizerOutput:
    """Returns ``out`` with another value; `dataclasses.replace` breaks the graph of torch 2.6."""
    return QuantizerOutput(
        quantized=quantized,
        indices=out.indices,
        loss=out.loss,
        terms=out.terms,
        selections=out.selections,
    )


def join(outs: list[QuantizerOutput], quantized: Tensor, indices: Tensor) -> QuantizerOutput:
    """Joins the results of several quantizers; terms of the same name add up."""
    terms: dict[str, Tensor] = {}
    for out in outs:
        for name, term in out.terms.items():
            terms[name] = terms[name] + term if name in terms else term
    return result(quantized, indices, terms, (s for out in outs for s in out.selections))


def columns(indices: Tensor, num_codebooks: list[int]) -> list[Tensor]:
    """Splits ``(..., q)`` into what each of several quantizers calls its indices."""
    if sum(num_codebooks) == 1:
        return [indices]
    return [
        part.squeeze(-1) if count == 1 else part
        for part, count in zip(indices.split(num_codebooks, dim=-1), num_codebooks, strict=True)
    ]


def stack_columns(parts: list[Tensor], num_codebooks: list[int]) -> Tensor:
    """The inverse of ``columns``."""
    if sum(num_codebooks) == 1:
        return parts[0]
    wide = [
        part.unsqueeze(-1) if count == 1 else part
        for part, count in zip(parts, num_codebooks, strict=True)
    ]
    return torch.cat(wide, dim=-1)


def stack_logits(parts: list[Tensor], num_codebooks: list[int]) -> Tensor:
    """Stacks ``(..., [q,] k)`` to ``(..., q, k)``; codes that a codebook lacks get ``-inf``."""
    size = max(part.shape[-1] for part in parts)
    wide = [
        part.unsqueeze(-2) if count == 1 else part
        for part, count in zip(parts, num_codebooks, strict=True)
    ]
    padded = [
        nn.functional.pad(part, (0, size - part.shape[-1]), value=-torch.inf) for part in wide
    ]
    stacked = torch.cat(padded, dim=-2)
    return stacked.squeeze(-2) if sum(num_codebooks) == 1 else stacked
