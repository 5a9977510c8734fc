"""What is measured of reconstructed images and of quantized features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tvqrap.images.detail import detail_energy
from vqprior.losses import FilterBank, FilterBankLoss
from vqprior.metrics import FrechetDistance, gmsd, psnr, rgb_to_luma, ssim

BORDER = 4  # pixels that are not judged, as in papers on super-resolution
PATCH = 32  # side of the patches whose texture is described
NUM_SCALES = 3  # of the filter bank
TEXTURE_DIM = 21 * NUM_SCALES
AROUND = 6  # low-resolution pixels along a side that a linear map sees of a place


@torch.no_grad()
def judge(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Compares images ``(b, 3, h, w)`` in [0, 1] with the true ones.

    Returns:
        Means over images of ``psnr`` and ``ssim`` of the luma, ``gmsd``, ``filters`` (the
        distance of a ``FilterBankLoss``) and ``detail`` (energy at frequencies that the
        low-resolution image lacks, as a share of the true one); and ``frechet``, the distance
        of the two sets of patches in ``describe_texture``.
    """
    inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    ours, theirs = images.float().clamp(0, 1)[inner], truth[inner]
    luma, true_luma = rgb_to_luma(ours), rgb_to_luma(theirs)
    frechet = FrechetDistance(TEXTURE_DIM).to(ours.device)
    frechet.update(describe_texture(ours), describe_texture(theirs))
    shares = [
        detail_energy(one) / detail_energy(other)
        for one, other in zip(luma, true_luma, strict=True)
    ]
    return {
        "psnr": float(psnr(luma, true_luma).mean()),
        "ssim": float(ssim(luma, true_luma).mean()),
        "gmsd": float(gmsd(ours, theirs).mean()),
        "filters": float(FilterBankLoss().to(ours.device)(ours, theirs)),
        "frechet": frechet.compute(),
        "detail": float(torch.stack(shares).mean()),
    }


def describe_texture(images: Tensor) -> Tensor:
    """Describes the texture of overlapping patches: ``(b, 3, h, w) -> (n, TEXTURE_DIM)``.

    Of each patch of 32 x 32 pixels, a patch every 16, at three scales and in luma and both chroma
    channels: the mean share of each of six filters in the local contrast, and the mean strength of
    that contrast in nepers above what is just noticed (see ``vqprior.losses.FilterBank``).
    Texture that is right in kind but not in place is near.
    """
    found = []
    for number, maps in enumerate(FilterBank(num_scales=NUM_SCALES).to(images.device)(images)):
        channels = maps.shape[1] // 7  # luma, then chroma, of each scale
        relative, strength = maps.split([6 * channels, channels], dim=1)
        described = torch.cat([relative.square(), strength], dim=1)
        side = PATCH >> (number // 2 + number % 2)
        found.append(F.avg_pool2d(described, side, stride=side // 2))
    rows = min(one.shape[2] for one in found)
    columns = min(one.shape[3] for one in found)
    joined = torch.cat([one[:, :, :rows, :columns] for one in found], dim=1)
    return joined.movedim(1, -1).flatten(0, 2)


def spectrum(vectors: Tensor) -> Tensor:
    """Returns the shares of the principal components in the variance of ``(n, d)``, falling."""
    variances = torch.linalg.eigvalsh(vectors.double().T.cov()).clamp_min(0).flip(0)
    return variances / variances.sum()


def effective_dimension(shares: Tensor) -> float:
    """The participation ratio of shares that add up to 1: how many equal ones would be as even."""
    return float(1 / shares.square().sum())


def surroundings(lr: Tensor, rows: int) -> Tensor:
    """Returns what a linear map sees of each place, for ``rows`` rows of places: ``(n, s)``."""
    step = lr.shape[2] // rows
    margin = (AROUND - step) // 2
    padded = F.pad(lr, (margin,) * 4, mode="reflect")
    patches = F.unfold(padded, AROUND, stride=step)
    return patches.movedim(1, 2).flatten(0, 1)


def explained(seen: Tensor, vectors: Tensor, *, tested: Tensor) -> float:
    """The share of the variance of ``vectors`` that a linear map of ``seen`` explains.

    Fitted with a little ridge on the places that are not ``tested``, and measured on those.

    Args:
        seen: ``(n, s)``.
        vectors: ``(n, d)``.
        tested: ``(n,)``, True for places to measure on.
    """
    one = torch.ones_like(seen[:, :1])
    inputs = torch.cat([seen, one], dim=1).double()
    targets = vectors.double()
    known, wanted = inputs[~tested], targets[~tested]
    gram = known.T @ known
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weights = torch.linalg.solve(gram + ridge, known.T @ wanted)
    missed = (targets[tested] - inputs[tested] @ weights).square().sum()
    spread = (targets[tested] - wanted.mean(dim=0)).square().sum()
    return float(1 - missed / spread)
