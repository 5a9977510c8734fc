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
    """Checks the input of a quantizer and returns which tokens are valid: not masked, and finite.

    For quantizers of your own: ``forward`` and ``encode`` start with it. Nothing is read back to
    the host. What an invalid token holds must not matter: put zeros there, or -1 for its index.

    Args:
        x: Vectors.
        mask: True for real tokens, or None.
        dim: Number of features ``d`` that the quantizer takes.

    Returns:
        True for valid tokens.

    Raises:
        TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
        ValueError: If the last dimension of ``x`` is not ``dim``, or ``mask`` has another shape
            than the tokens.

    Shape:
        - ``x``: ``(..., d)``
        - ``mask``, returns: ``(...)``

    Examples:
        >>> import torch
        >>> from vqprior import valid_tokens
        >>> x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, 4.0]])
        >>> valid_tokens(x, torch.tensor([True, True, False]), dim=2)
        tensor([ True, False, False])
    """
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
    x: Tensor, indices: Tensor, dim: int, codebook_sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Checks vectors and the indices that were chosen for them; returns clean vectors and validity.

    For quantizers of your own: ``quantize_as`` starts with it. A token is valid if it is finite
    and at least one of its indices names a code.

    Args:
        x: Vectors.
        indices: Their indices, -1 where there is none.
        dim: Number of features ``d`` that the quantizer takes.
        codebook_sizes: Number of codes that each of the ``q`` indices of a token can name.

    Returns:
        ``x`` with zeros where a token is not valid, and True for valid tokens.

    Raises:
        TypeError: If ``x`` is not floating point or ``indices`` not an integer tensor.
        ValueError: On a wrong shape, or if an index on the CPU names no code.

    Shape:
        - ``x``: ``(..., d)``
        - ``indices``: ``(...)``, or ``(..., q)`` for ``q`` above 1
        - returns: ``(..., d)`` and ``(...)``

    Examples:
        >>> import torch
        >>> from vqprior import validate_assignment
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> validate_assignment(x, torch.tensor([7, -1]), dim=2, codebook_sizes=(8,))
        (tensor([[1., 2.],
                [0., 0.]]), tensor([ True, False]))
    """
    check_floating("x", x)
    check_last_dim("x", x, dim)
    validate_indices(indices, codebook_sizes)
    several = () if len(codebook_sizes) == 1 else (len(codebook_sizes),)
    check_shape("indices", indices, (*x.shape[:-1], *several))
    return validate_input(x, has_any_index(indices, len(codebook_sizes)), dim)


def validate_indices(indices: Tensor, codebook_sizes: tuple[int, ...]) -> None:
    """Raises unless indices are integers that name codes, or -1.

    For quantizers of your own: ``decode`` starts with it. Values are read on the CPU alone, where
    nothing has to be waited for.

    Args:
        indices: The indices.
        codebook_sizes: Number of codes that each of the ``q`` indices of a token can name.

    Returns:
        None.

    Raises:
        TypeError: If ``indices`` is not an integer tensor.
        ValueError: If there are not ``q`` of them for each token, or one on the CPU names no code.

    Shape:
        - ``indices``: ``(...)``, or ``(..., q)`` for ``q`` above 1

    Examples:
        >>> import torch
        >>> from vqprior import validate_indices
        >>> validate_indices(torch.tensor([0, 7, -1]), codebook_sizes=(8,))
    """
    check_indices(indices, len(codebook_sizes))
    columns = [indices] if len(codebook_sizes) == 1 else indices.unbind(-1)
    for column, size in zip(columns, codebook_sizes, strict=True):
        check_index_range("indices", column, size)


def check_indices(indices: Tensor, num_codebooks: int) -> None:
    """Raises unless ``indices`` are integers ``(...)``, or ``(..., q)`` for ``q`` codebooks."""
    check_integer("indices", indices)
    if num_codebooks > 1 and (indices.ndim == 0 or indices.shape[-1] != num_codebooks):
        raise ValueError(
            f"`indices` must have shape (..., {num_codebooks}), an index for each codebook, got "
            f"{tuple(indices.shape)}. Fill up with -1 what is not known."
        )
