"""Cross-entropy losses for predicted indices."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import (
    check_codes,
    check_floating,
    check_index_range,
    check_integer,
    check_interval,
    check_positive,
    check_shape,
)
from vqprior.functional._location import find_center, sizes_of


def index_cross_entropy(
    logits: Tensor,
    indices: Tensor,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Computes the cross-entropy between predicted logits and target indices.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        indices: Target indices; tokens with -1 are ignored.
        label_smoothing: Share of the target spread uniformly over all codes, in ``[0, 1)``.
        weights: Weight of each token, at least 0; equal by default. Tokens with weight 0 are
            ignored, even if their logits are NaN.

    Returns:
        The weighted mean over valid tokens in nats, in float32 or wider; 0 if no token is valid.

    Raises:
        TypeError: If ``logits`` or ``weights`` is not floating point or ``indices`` is not an
            integer tensor.
        ValueError: If the shapes do not match, an index on the CPU is out of range, or
            ``label_smoothing`` is out of range.

    Shape:
        - ``logits``: ``(..., k)``
        - ``indices``, ``weights``: ``(...)``
        - returns: ``()``

    Examples:
        >>> import torch
        >>> from vqprior.functional import index_cross_entropy
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 9.0], [float("nan"), 0.0]])
        >>> index_cross_entropy(logits, torch.tensor([0, 1, -1]))
        tensor(0.6931)
    """
    check_interval("label_smoothing", label_smoothing, 0.0, 1.0)
    wide, valid = _validate_input(logits, indices, weights)
    losses = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]),
        torch.where(valid, indices.long(), -1).reshape(-1),
        ignore_index=-1,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return _weighted_mean(losses.reshape(indices.shape), valid, weights)


def distance_cross_entropy(
    logits: Tensor,
    indices: Tensor,
    codes: Tensor,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Computes the cross-entropy between predicted logits and soft targets around the true code.

    The target distribution of a token with true index ``t`` is
    ``softmax_j(-|e_j - e_t|^2 / temperature)``, so a wrong code costs less if it is close to the
    true one. Targets carry no gradient and take no more memory than ``logits``. As the
    temperature goes to 0, the loss approaches ``index_cross_entropy``. Its minimum is the
    entropy of the targets, not 0.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        indices: Target indices; tokens with -1 are ignored.
        codes: The codebook that the indices refer to.
        temperature: Squared distance at which a target falls by a factor of ``e``, greater than
            0.
        weights: Weight of each token, at least 0; equal by default. Tokens with weight 0 are
            ignored, even if their logits are NaN.

    Returns:
        The weighted mean over valid tokens in nats, in float32 or wider; 0 if no token is valid.

    Raises:
        TypeError: If ``logits``, ``codes`` or ``weights`` is not floating point or ``indices``
            is not an integer tensor.
        ValueError: If the shapes do not match, an index on the CPU is out of range, or
            ``temperature`` is not greater than 0.

    Shape:
        - ``logits``: ``(..., k)``
        - ``indices``, ``weights``: ``(...)``
        - ``codes``: ``(k, d)``
        - returns: ``()``

    Examples:
        >>> import torch
        >>> from vqprior.functional import distance_cross_entropy
        >>> codes = torch.tensor([[0.0], [1.0], [9.0]])
        >>> near, far = torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([[0.0, 0.0, 5.0]])
        >>> truth = torch.tensor([0])
        >>> distance_cross_entropy(near, truth, codes) < distance_cross_entropy(far, truth, codes)
        tensor(True)
    """
    check_codes("codes", codes)
    check_positive("temperature", temperature)
    wide, valid = _validate_input(logits, indices, weights)
    if logits.shape[-1] != codes.shape[0]:
        raise ValueError(
            f"`logits` must have shape (..., {codes.shape[0]}), one entry for each code, "
            f"got {tuple(logits.shape)}."
        )
    targets = _neighbors(indices.long().clamp_min(0), codes.detach().to(wide.dtype), temperature)
    # A logit of minus infinity costs nothing where its target is 0: clamped, 0 * -inf is not NaN.
    log_probabilities = wide.log_softmax(dim=-1).clamp_min(torch.finfo(wide.dtype).min)
    losses = -(targets * log_probabilities).sum(dim=-1)
    return _weighted_mean(losses, valid, weights)


@torch.no_grad()
def _neighbors(indices: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Returns the target distribution of each index: ``(...) -> (..., k)``."""
    # With fewer codes than tokens, it is cheaper to compute all pairs of codes once.
    by_code = codes.shape[0] < indices.numel()
    with torch.autocast(codes.device.type, enabled=False):
        finite = sizes_of(codes) < torch.inf
        codes = torch.where(finite.unsqueeze(1), codes, 0.0)
        codes = codes - find_center(codes)  # a common offset would cost precision
        rows = codes if by_code else codes[indices]
        lengths = torch.where(finite, codes.square().sum(dim=1), torch.inf)
        distances = lengths - 2 * rows @ codes.T  # up to a constant per row
        # With a minimum of 0, a small temperature cannot make all of them infinite.
        distances = distances - distances.amin(dim=-1, keepdim=True)
        temperature = max(temperature, torch.finfo(codes.dtype).tiny)
        targets = (-distances / temperature).softmax(dim=-1)
    return targets[indices] if by_code else targets


def _validate_input(
    logits: Tensor, indices: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Checks the input; returns the logits, zeroed and widened, and the mask of valid tokens."""
    check_floating("logits", logits)
    check_integer("indices", indices)
    check_shape("indices", indices, logits.shape[:-1])
    check_index_range("indices", indices, logits.shape[-1])
    valid = indices >= 0
    if weights is not None:
        check_floating("weights", weights)
        check_shape("weights", weights, indices.shape)
        valid = valid & (weights > 0)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(valid.unsqueeze(-1), wide, 0.0), valid


def _weighted_mean(losses: Tensor, valid: Tensor, weights: Tensor | None) -> Tensor:
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
    weights = torch.where(valid, weights, 0.0)
    losses = torch.where(valid, losses, 0.0)
    mass = weights.sum()
    return (weights * losses).sum() / torch.where(mass > 0, mass, 1.0)
