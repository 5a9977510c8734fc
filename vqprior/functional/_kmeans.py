"""k-means clustering, to initialize codebooks from data."""

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_floating
from vqprior.functional._search import nearest_indices
from vqprior.functional._statistics import code_sums_and_counts


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_codes: int,
    *,
    iterations: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Clusters vectors by Lloyd's algorithm and returns the cluster means.

    Starts from a random sample without replacement. An empty cluster moves to the vector furthest
    from its own mean, if that distance is not 0. With fewer distinct vectors than codes, means
    repeat; every returned row is finite.

    Args:
        x: Vectors; those with a non-finite feature are ignored.
        num_codes: Number of clusters ``k``, at least 1.
        iterations: Number of Lloyd iterations, at least 0; 0 returns the random sample.
        generator: Random number generator.

    Returns:
        Cluster means, in float32 or wider.

    Raises:
        TypeError: If ``x`` is not floating point.
        ValueError: If ``x`` is a scalar or holds no finite vector, ``num_codes`` is below 1 or
            ``iterations`` is negative.

    Shape:
        - ``x``: ``(..., d)``
        - returns: ``(k, d)``

    References:
        Lloyd, *Least Squares Quantization in PCM*, 1982.

    Examples:
        >>> import torch
        >>> from vqprior.functional import kmeans
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> kmeans(x, 2).sort(dim=0).values
        tensor([[ 0.5000],
                [10.5000]])
    """
    check_floating("x", x)
    check_at_least("num_codes", num_codes, 1)
    check_at_least("iterations", iterations, 0)
    if x.ndim == 0:
        raise ValueError("`x` must have shape (..., d), got ().")
    flat = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    flat = flat[flat.isfinite().all(dim=1)]
    if flat.shape[0] == 0:
        raise ValueError(f"`x` must hold at least one finite vector, got {tuple(x.shape)}.")
    device = generator.device if generator is not None else "cpu"
    order = torch.randperm(flat.shape[0], generator=generator, device=device).to(x.device)
    means = flat[order[torch.arange(num_codes, device=x.device) % flat.shape[0]]]
    for _ in range(iterations):
        means = _lloyd_step(flat, means)
    return means


def _lloyd_step(x: Tensor, means: Tensor) -> Tensor:
    indices = nearest_indices(x, means)
    statistics = code_sums_and_counts(x, indices, means.shape[0])
    sums, counts = statistics[:, :-1], statistics[:, -1:]
    moved = torch.where(counts > 0, sums / counts.clamp_min(1), means)
    # The j-th empty cluster takes the j-th worst vector, unless that vector equals its mean.
    errors, worst = (x - means[indices]).square().sum(dim=1).sort(descending=True, stable=True)
    empty = counts.squeeze(1) == 0
    turn = (empty.cumsum(0) - 1).clamp(0, x.shape[0] - 1)
    useful = empty & (errors[turn] > 0)
    return torch.where(useful.unsqueeze(1), x[worst[turn]], moved)
