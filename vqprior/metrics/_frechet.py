"""Distance of two sets of feature vectors, each seen as a Gaussian."""

from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_floating
from vqprior._distributed import all_reduce_sum_
from vqprior.metrics._accumulator import Accumulator


@final
class FrechetDistance(Accumulator):
    """Frechet distance of two sets of feature vectors, as in the FID; lower is better.

    Each set is seen as a Gaussian of its mean ``m`` and covariance ``S``. The distance is
    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``, which is at least 0, is 0 up to rounding for
    equal sets, does not depend on which set is which, and grows with the square of the unit of the
    features. Vectors are not compared one by one: the sets may differ in size.

    The features are the caller's: the output of a network, pooled over each image, or any
    other description of images, sound or tokens. With the activations of the Inception network
    that the authors chose, this is their FID.

    ``update(ours, theirs)`` counts a batch of each set, ``compute()`` gives the distance of the two
    sets of all ranks, ``reset()`` starts again. Counts are exact, and means and covariances are
    float64, centered while they are summed, so that large means cost no digits. How vectors
    are split into batches and ranks matters to rounding only. ``update`` reads nothing back to the
    host.

    Few vectors make the distance too large, on average. For two samples of ``n`` vectors each
    from one standard Gaussian it is about ``d (d + 5) / (2 n)`` instead of 0 where ``n`` is far
    above ``d``: it halves when ``n`` doubles. How large the excess is depends on the distributions,
    too; for what it would be without, fit a line in ``1 / n`` to distances of several ``n``
    (Chong and Forsyth). Compare only numbers of the same features and the same counts.

    Args:
        dim: Number of features ``d``, at least 1. The memory taken grows with its square.

    Raises:
        ValueError: If ``dim`` is below 1.

    Shape:
        - ``ours``: ``(..., d)``
        - ``theirs``: ``(..., d)``, in any other number

    References:
        Heusel et al., *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium*, NeurIPS 2017, equation 6, with covariances that divide by ``n - 1`` as in the
        authors' code. The trace of the root is the sum of the singular values of ``R1^T R2`` where
        ``S = R R^T``, which needs no root of a matrix that is not symmetric; nothing is added to
        singular covariances. <https://arxiv.org/abs/1706.08500>

        Dowson and Landau, *The Frechet Distance between Multivariate Normal Distributions*,
        Journal of Multivariate Analysis 1982, who call the square root of this the distance.
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

        The sets may come in batches of different sizes, and one at a time:

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
        self.register_buffer("means", torch.zeros(2, dim, dtype=torch.float64))
        self.register_buffer("scatters", torch.zeros(2, dim, dim, dtype=torch.float64))

    def extra_repr(self) -> str:
        """Shows the number of features in ``repr``."""
        return f"{self.dim}"

    @torch.no_grad()
    def update(self, ours: Tensor, theirs: Tensor) -> None:
        """Counts a batch of each set; either may be empty.

        A vector that is not finite is counted as it is: from then on the distance is NaN.

        Raises:
            TypeError: If a batch is not floating point.
            ValueError: If a batch is not of shape ``(..., d)``.
        """
        for name, features in (("ours", ours), ("theirs", theirs)):
            check_floating(name, features)
            if features.ndim == 0 or features.shape[-1] != self.dim:
                raise ValueError(
                    f"`{name}` must have shape (..., {self.dim}), got {tuple(features.shape)}. "
                    "Features come last: of maps (b, d, h, w), pass `maps.movedim(1, -1)`."
                )
        self._count(0, ours)
        self._count(1, theirs)

    def _count(self, side: int, features: Tensor) -> None:
        """Adds a batch to one of the sets."""
        vectors = features.reshape(-1, self.dim).double()
        number = vectors.shape[0]
        if number == 0:
            return
        count, mean, scatter = self.counts[side], self.means[side], self.scatters[side]
        batch_mean = vectors.mean(dim=0)
        centered = vectors - batch_mean
        gap = batch_mean - mean
        before = count.double()
        share = number / (before + number)
        scatter.addmm_(centered.T, centered).addr_(before * share * gap, gap)
        mean += share * gap
        count += number

    def compute(self) -> float:
        """Returns the distance of the two sets since ``reset``.

        NaN if a set has fewer than 2 vectors, or one that is not finite. Every rank must call, and
        gets the same value; what each rank counted stays as it is.
        """
        counts, means, scatters = self._joint()
        covariances = scatters / (counts - 1).reshape(2, 1, 1)
        if counts.min() < 2 or not covariances.isfinite().all():
            return float("nan")
        roots = [_root(covariance) for covariance in covariances]
        overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
        gap = (means[0] - means[1]).square().sum()
        spread = covariances.diagonal(dim1=1, dim2=2).sum()
        return max(float(gap + spread - 2 * overlap), 0.0)  # what is below 0 is rounding

    def _joint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, means and scatters of the sets of all ranks, in float64."""
        counts = self.counts.double().unsqueeze(1)
        sums = all_reduce_sum_(torch.cat([counts, counts * self.means], dim=1))
        joint_counts, means = sums[:, 0], sums[:, 1:] / sums[:, :1].clamp_min(1)
        gaps = (self.means - means).unsqueeze(2)
        between = counts.unsqueeze(2) * gaps * gaps.mT
        return joint_counts, means, all_reduce_sum_(self.scatters + between)


def _root(covariance: Tensor) -> Tensor:
    """Returns ``R`` with ``R R^T`` the covariance: ``(d, d) -> (d, rank)``."""
    values, vectors = torch.linalg.eigh(covariance)
    # Where the covariance is singular, values are rounding: 1e-16, whose root is 1e-8.
    spread = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    root: Tensor = vectors[:, spread] * values[spread].sqrt()  # eigh has no types
    return root
