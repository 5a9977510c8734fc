"""Frechet distance between two sets of feature vectors."""

from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_floating
from vqprior._distributed import all_reduce_sum_
from vqprior._precision import to_float64
from vqprior.metrics._accumulator import Accumulator


@final
class FrechetDistance(Accumulator):
    """Computes the Frechet distance between two sets of feature vectors, as in FID.

    Lower is better. Each set is modeled as a Gaussian with mean ``m`` and covariance ``S``. The
    distance is ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``: symmetric, at least 0, and 0 up to
    rounding for equal sets. Features ``s`` times as large give ``s^2`` times the distance. The sets
    may differ in size.

    You choose the features: for example pooled network activations of each image. With the
    activations of the Inception network of Heusel et al., this is their FID.

    ``update(ours, theirs)`` adds a batch to each set, ``compute()`` returns the distance over all
    ranks, and ``reset()`` starts over. Means and covariances are accumulated in float64 (float32 on
    Apple GPUs) and centered, so large means cost no precision; the split into batches and ranks
    affects only rounding. ``update`` does not synchronize the device.

    The distance is biased upward for small sets. For two samples of ``n`` vectors from one standard
    Gaussian, it is about ``d (d + 5) / (2 n)`` instead of 0 if ``n`` is much larger than ``d``. The
    bias also depends on the distributions; to remove it, fit a line in ``1 / n`` to distances for
    several ``n`` (Chong and Forsyth). Compare only values with the same features and counts.

    Args:
        dim: Number of features ``d``, at least 1. Memory grows with its square.

    Raises:
        ValueError: If ``dim`` is below 1.

    Shape:
        - ``ours``: ``(..., d)``
        - ``theirs``: ``(..., d)``; leading dimensions may differ

    References:
        Heusel et al., *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium*, NeurIPS 2017, equation 6, with covariances divided by ``n - 1`` as in the
        authors' code. The trace of the matrix root is computed as the sum of the singular values of
        ``R1^T R2`` with ``S = R R^T``; nothing is added to singular covariances.
        <https://arxiv.org/abs/1706.08500>

        Dowson and Landau, *The Frechet Distance between Multivariate Normal Distributions*,
        Journal of Multivariate Analysis 1982; they define the distance as the square root of this.
        <https://doi.org/10.1016/0047-259X(82)90077-X>

        Chong and Forsyth, *Effectively Unbiased FID and Inception Score and where to find them*,
        CVPR 2020, on the bias. <https://arxiv.org/abs/1911.07023>

    Examples:
        >>> import torch
        >>> from vqprior.metrics import FrechetDistance
        >>> metric = FrechetDistance(2)
        >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> metric.update(square, square + 3)
        >>> round(metric.compute(), 4)
        18.0

        Batches may differ in size, and one of them may be empty:

        >>> metric.reset()
        >>> metric.update(torch.randn(100, 2), torch.empty(0, 2))
        >>> metric.update(torch.empty(0, 2), torch.randn(2, 30, 2))
        >>> metric.compute() >= 0
        True
    """

    counts: Tensor
    means: Tensor
    scatters: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        self.dim = dim
        # Ours, then theirs.
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("means", self._sums(2, dim))
        self.register_buffer("scatters", self._sums(2, dim, dim))

    def extra_repr(self) -> str:
        """Shows the number of features in ``repr``."""
        return f"{self.dim}"

    @torch.no_grad()
    def update(self, ours: Tensor, theirs: Tensor) -> None:
        """Adds a batch to each set; either may be empty.

        After a non-finite vector, the distance is NaN until ``reset``.

        Raises:
            TypeError: If a batch is not floating point.
            ValueError: If a batch is not of shape ``(..., d)``.
        """
        for name, features in (("ours", ours), ("theirs", theirs)):
            check_floating(name, features)
            if features.ndim == 0 or features.shape[-1] != self.dim:
                raise ValueError(
                    f"`{name}` must have shape (..., {self.dim}), got {tuple(features.shape)}. "
                    "Features come last: for maps (b, d, h, w), pass `maps.movedim(1, -1)`."
                )
        self._count(0, ours)
        self._count(1, theirs)

    def _count(self, side: int, features: Tensor) -> None:
        """Adds a batch to one of the sets."""
        vectors = features.reshape(-1, self.dim).to(self.means.dtype)
        number = vectors.shape[0]
        if number == 0:
            return
        count, mean, scatter = self.counts[side], self.means[side], self.scatters[side]
        batch_mean = vectors.mean(dim=0)
        centered = vectors - batch_mean
        gap = batch_mean - mean
        before = count.to(mean.dtype)
        share = number / (before + number)
        scatter.addmm_(centered.T, centered).addr_(before * share * gap, gap)
        mean += share * gap
        count += number

    def compute(self) -> float:
        """Returns the distance between the two sets since ``reset``, over all ranks.

        NaN if a set has fewer than 2 vectors or a non-finite one. Every rank must call and gets
        the same value; the state does not change.
        """
        counts, means, scatters = self._joint()
        covariances = scatters / (counts - 1).reshape(2, 1, 1)
        if counts.min() < 2 or not covariances.isfinite().all():
            return float("nan")
        roots = [_root(covariance) for covariance in covariances]
        overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
        gap = (means[0] - means[1]).square().sum()
        spread = covariances.diagonal(dim1=1, dim2=2).sum()
        return max(float(gap + spread - 2 * overlap), 0.0)  # rounding can make it negative

    def _joint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the counts, means and scatters over all ranks, in float64."""
        counts = self.counts.to(self.means.dtype).unsqueeze(1)
        sums = all_reduce_sum_(torch.cat([counts, counts * self.means], dim=1))
        joint_counts, means = sums[:, 0], sums[:, 1:] / sums[:, :1].clamp_min(1)
        gaps = (self.means - means).unsqueeze(2)
        between = counts.unsqueeze(2) * gaps * gaps.mT
        scatters = all_reduce_sum_(self.scatters + between)
        return to_float64(joint_counts), to_float64(means), to_float64(scatters)


def _root(covariance: Tensor) -> Tensor:
    """Returns ``R`` with ``R R^T`` the covariance: ``(d, d) -> (d, rank)``."""
    values, vectors = torch.linalg.eigh(covariance)
    # Drop eigenvalues that are rounding of 0: the root of 1e-16 would be 1e-8.
    spread = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    root: Tensor = vectors[:, spread] * values[spread].sqrt()  # eigh has no types
    return root
