"""Input checks, and which tokens are valid."""

import warnings
from collections.abc import Iterable

import numpy as np
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
from vqprior._interfaces import Quantizer, QuantizerBase
from vqprior.functional._kernels._host import is_on_host, where_valid
from vqprior.quantizers._shared._columns import has_any_index

_NUMPY_DTYPES = {torch.float16, torch.float32, torch.float64}


def check_quantizer(name: str, quantizer: object) -> None:
    """Raises ``TypeError`` unless ``quantizer`` is a quantizer that takes one tensor."""
    if not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"`{name}` must be a quantizer, got {type(quantizer).__name__}. Only the "
            "outermost quantizer can be a `TextureQuantizer`."
        )


def check_features_last(name: str, quantizer: Quantizer) -> None:
    """Raises unless ``quantizer`` is a quantizer with features last."""
    check_quantizer(name, quantizer)
    if not quantizer.features_last:
        raise ValueError(
            f"`{name}` must have features last, got {type(quantizer).__name__}. Wrap the outer "
            "quantizer in `ChannelsFirst` instead."
        )


def check_index_per_token(name: str, quantizer: Quantizer) -> None:
    """Raises unless ``quantizer`` has features last and indices for each token."""
    check_features_last(name, quantizer)
    if not quantizer.has_index_per_token:
        raise ValueError(
            f"`{name}` must have indices for each token, got {type(quantizer).__name__}. Wrap the "
            "outer quantizer in `MultiScaleQuantizer` instead."
        )


def know_layout(quantizers: Iterable[nn.Module]) -> None:
    """Keeps ``warn_of_channels_first`` silent in quantizers and all that is nested in them."""
    for quantizer in quantizers:
        for module in quantizer.modules():
            if isinstance(module, QuantizerBase):
                module._layout_is_known = True


def warn_of_channels_first(quantizer: Quantizer, x: Tensor) -> None:
    """Warns if ``x`` ``(..., d)`` may be a feature map ``(b, d, h, w)`` of width ``d``.

    Such a map passes all checks, and the quantizer would quantize along its width. Both layouts
    are possible where ``d`` is the height too, or the number of channels; rows of the width of
    ``d`` are rare where features do come last. Call it in ``forward`` after the input is checked.
    """
    if x.ndim != 4 or quantizer._layout_is_known or torch.compiler.is_compiling():
        return
    dim = x.shape[3]
    if dim > 1 and dim in x.shape[1:3] and x.is_contiguous():
        warnings.warn(
            f"`x` of shape {tuple(x.shape)} looks like feature maps (b, d, h, w), but features "
            "come last: the tokens are its rows. For feature maps, wrap the quantizer in "
            "`ChannelsFirst`. If features do come last, pass `x.flatten(1, 2)` to silence this.",
            stacklevel=5,  # past the quantizer and torch's `__call__`, to the caller
        )


def valid_tokens(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Checks the input of a quantizer and returns which tokens are valid: not masked and finite.

    Call it first in ``forward`` and ``encode`` of a custom quantizer, and return zeros and the
    index -1 for tokens that are not valid. It does not synchronize with the device.

    Args:
        x: Vectors.
        mask: True for real tokens, or None.
        dim: Number of features ``d`` of the quantizer.

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
    if mask is not None:
        check_mask(mask, x.shape[:-1])
    if x.dtype in _NUMPY_DTYPES and is_on_host(x):
        return _valid_on_host(x.detach(), mask)
    # Two passes over `x`; `isfinite` takes three, and reducing booleans is slow.
    valid = (x.amax(dim=-1) < torch.inf) & (x.amin(dim=-1) > -torch.inf)
    return valid if mask is None else valid & mask


def _valid_on_host(x: Tensor, mask: Tensor | None) -> Tensor:
    """As above, by numpy where it costs less: for one number per token."""
    valid = (x.amax(dim=-1).numpy() < np.inf) & (x.amin(dim=-1).numpy() > -np.inf)
    if mask is not None:
        valid = valid & mask.numpy()
    return torch.from_numpy(np.asarray(valid))


def validate_input(x: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Checks the input; returns it with zeros for invalid tokens, and which tokens are valid."""
    valid = valid_tokens(x, mask, dim)
    return where_valid(valid, x, 0.0), valid


def validate_assignment(
    x: Tensor, indices: Tensor, dim: int, codebook_sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Checks vectors and the indices chosen for them; returns the vectors and which are valid.

    Call it first in ``quantize_as`` of a custom quantizer. A token is valid if it is finite and
    at least one of its indices is not -1.

    Args:
        x: Vectors.
        indices: Their indices, -1 for none.
        dim: Number of features ``d`` of the quantizer.
        codebook_sizes: Number of codes of each of the ``q`` codebooks.

    Returns:
        ``x`` with zeros for invalid tokens, and a mask that is True for valid tokens.

    Raises:
        TypeError: If ``x`` is not floating point or ``indices`` not an integer tensor.
        ValueError: If a shape is wrong, or an index on the CPU names no code.

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
    """Raises unless ``indices`` are integers that name codes, or -1.

    Call it first in ``decode`` of a custom quantizer. Indices are range-checked on the CPU only;
    on a GPU the check would force a synchronization.

    Args:
        indices: The indices to check.
        codebook_sizes: Number of codes of each of the ``q`` codebooks.

    Returns:
        None.

    Raises:
        TypeError: If ``indices`` is not an integer tensor.
        ValueError: If a token does not have ``q`` indices, or one on the CPU names no code.

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
            f"`indices` must have shape (..., {num_codebooks}), one index per codebook, got "
            f"{tuple(indices.shape)}. Use -1 for unknown indices."
        )
