"""Checked input: which tokens are valid, and what stands where they are not."""

import torch
from torch import Tensor

from vqprior._checks import (
    check_floating,
    check_index_range,
    check_integer,
    check_last_dim,
    check_mask,
    check_shape,
)
from vqprior._interfaces import Quantizer
from vqprior.quantizers._shared._columns import has_any_index


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
            f"`{name}` must have features last, got {type(quantizer).__name__}. Put "
            "`ChannelsFirst` outside."
        )


def check_index_per_token(name: str, quantizer: Quantizer) -> None:
    """Raises unless ``quantizer`` has features last, and indices for each token."""
    check_features_last(name, quantizer)
    if not quantizer.has_index_per_token:
        raise ValueError(
            f"`{name}` must have indices for each token, got {type(quantizer).__name__}. Put "
            "`MultiScaleQuantizer` outside."
        )


def valid_tokens(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Checks the input; returns which tokens count: not masked, and finite."""
    check_floating("x", x)
    check_last_dim("x", x, dim)
    # Two plain passes; `isfinite` takes three, and the reduction of booleans is slow.
    valid = (x.amax(dim=-1) < torch.inf) & (x.amin(dim=-1) > -torch.inf)
    if mask is not None:
        check_mask(mask, x.shape[:-1])
        valid = valid & mask
    return valid


def validate_input(x: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Checks the input; returns it with zeros where it does not count, and where it does."""
    valid = valid_tokens(x, mask, dim)
    return torch.where(valid.unsqueeze(-1), x, 0.0), valid


def validate_assignment(
    x: Tensor, indices: Tensor, dim: int, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """As ``validate_input``, for tokens whose ``indices`` were chosen elsewhere."""
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
    return validate_input(x, has_any_index(indices, len(sizes)), dim)


def check_indices(indices: Tensor, num_codebooks: int) -> None:
    """Raises unless ``indices`` are integers ``(...)``, or ``(..., q)`` for ``q`` codebooks."""
    check_integer("indices", indices)
    if num_codebooks > 1 and (indices.ndim == 0 or indices.shape[-1] != num_codebooks):
        raise ValueError(
            f"`indices` must have shape (..., {num_codebooks}), an index for each codebook, got "
            f"{tuple(indices.shape)}. Fill up with -1 what is not known."
        )
