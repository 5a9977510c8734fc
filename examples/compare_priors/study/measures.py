"""Measures of tokenizers, of predictors, and of their images."""

import statistics

import torch
from torch import Tensor
from torch.nn import functional as F

import evaluate
from study.priors import mask_of
from study.setting import PIECES, Setting
from study.table import TokenizerRow
from study.training import VectorResolver, prepared
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from vqprior.functional import nearest_indices
from vqprior.losses import FilterBank, FilterBankLoss
from vqprior.metrics import CodebookUsage, FrechetDistance

PATCH = 32  # side of the patches whose texture is described
NUM_SCALES = 3  # of the filter bank
TEXTURE_DIM = 21 * NUM_SCALES
AROUND = 6  # low-resolution pixels along a side around a place, the input of the linear map


@torch.no_grad()
def measure_tokenizer(tokenizer: TextureTokenizer, row: TokenizerRow, setting: Setting) -> dict:
    """Measures a tokenizer on held-out images.

    Returns the scores of ``judge`` for the reconstructions, and for the vectors before quantization
    the shares of their variance that quantization loses (``quantization_error``) and that a linear
    map of the low-resolution image explains (``explained``). ``parameters`` excludes codes.
    """
    maps = tokenizer.quantizer.quantizer  # the quantizer of maps, without the structure
    usage = CodebookUsage(maps.codebook_size).to(setting.device)
    images, vectors, lost = [], [], 0.0
    for hr, lr in setting.parts():
        tokenized = tokenizer(hr, lr, mask_of(row, lr))
        usage.update(tokenized.quantizer_output.indices)
        images.append(tokenized.image)
        vectors.append(prepared(tokenizer, hr, lr))
        lost += float((maps.quantizer(vectors[-1]).quantized - vectors[-1]).square().sum())
    rows = vectors[0].shape[1]
    flat = torch.cat(vectors).flatten(0, 2)
    photo_of = torch.arange(len(flat), device=flat.device) // (PIECES * rows**2)
    seen = surroundings(setting.lr, rows)
    table = sum(p.numel() for codebook in set(maps.codebooks) for p in codebook.parameters())
    codes = usage.compute()
    has_codes = mask_of(row, setting.lr) is None
    found = {
        **judge(torch.cat(images), setting.hr),
        "bits_per_pixel": maps.bits_per_token / tokenizer.config.grid**2 if has_codes else 0.0,
        "parameters": sum(p.numel() for p in tokenizer.parameters()) - table,
        "perplexity": codes.perplexity,
        "usage": codes.usage,
        "quantization_error": lost / float((flat - flat.mean(dim=0)).square().sum()),
        "effective_dimension": effective_dimension(flat),
        "explained": explained(seen, flat, tested=photo_of % 2 == 1),
    }
    if tokenizer.structure.regressed:
        found["structure_per_pixel"] = tokenizer.structure.channels / row.stride**2
    return found


@torch.no_grad()
def measure_predictor(model: SuperResolver, setting: Setting) -> dict:
    """Measures a predictor on held-out images.

    Returns the scores of ``judge`` for the images, the share of right codes (``accuracy``), and the
    mean probability of the chosen codes (``confidence``).
    """
    images, right, sure = [], [], []
    for hr, lr in setting.parts():
        prediction = model.predict(lr)
        images.append(model.reconstruct(prediction, lr))
        truth = model.tokenizer.describe(hr, lr).indices
        if not isinstance(model, VectorResolver):
            confidence, chosen = prediction.logits.softmax(dim=-1).max(dim=-1)
            sure.append(confidence)
            right.append(chosen == truth)
        elif model.nearest:
            right.append(nearest_indices(prediction.logits, model.tokenizer.codes) == truth)
    found = judge(torch.cat(images), setting.hr)
    means = {"accuracy": right, "confidence": sure}
    return found | {name: float(torch.cat(m).float().mean()) for name, m in means.items() if m}


@torch.no_grad()
def judge(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Compares images ``(b, 3, h, w)`` in [0, 1] with the originals.

    Returns means over images of the scores of evaluate.py and of ``filters``, a ``FilterBankLoss``;
    and ``frechet``, the Frechet distance of the two sets of patches under ``describe_texture``.
    """
    images = images.float().clamp(0, 1)
    scores = [evaluate.measure(*pair) for pair in zip(images, truth, strict=True)]
    means = [statistics.fmean(column) for column in zip(*scores, strict=True)]
    ours, theirs = (F.pad(whole, (-evaluate.BORDER,) * 4) for whole in (images, truth))
    frechet = FrechetDistance(TEXTURE_DIM).to(ours.device)
    frechet.update(describe_texture(ours), describe_texture(theirs))
    return {
        **dict(zip(evaluate.Scores._fields, means, strict=True)),
        "filters": float(FilterBankLoss().to(ours.device)(ours, theirs)),
        "frechet": frechet.compute(),
    }


def describe_texture(images: Tensor) -> Tensor:
    """Describes the texture of overlapping patches: ``(b, 3, h, w) -> (n, TEXTURE_DIM)``.

    For each patch of 32 x 32 pixels, one every 16, at three scales and in luma and both chroma
    channels: the mean share of each of six filters in the local contrast, and the mean strength of
    that contrast in nepers above the visibility threshold (see ``vqprior.losses.FilterBank``).
    The description does not depend on where in the patch the texture is.
    """
    found = []
    for number, maps in enumerate(FilterBank(num_scales=NUM_SCALES).to(images.device)(images)):
        channels = maps.shape[1] // 7  # luma, then chroma, of each scale
        relative, strength = maps.split([6 * channels, channels], dim=1)
        described = torch.cat([relative.square(), strength], dim=1)
        side = PATCH >> (number // 2 + number % 2)
        found.append(F.avg_pool2d(described, side, stride=side // 2))
    rows, columns = (min(one.shape[dim] for one in found) for dim in (2, 3))
    joined = torch.cat([one[:, :, :rows, :columns] for one in found], dim=1)
    return joined.movedim(1, -1).flatten(0, 2)


def effective_dimension(vectors: Tensor) -> float:
    """Returns the participation ratio of the covariance spectrum of ``(n, d)``."""
    variances = torch.linalg.eigvalsh(vectors.double().T.cov())
    return float(variances.sum().square() / variances.square().sum())


def surroundings(lr: Tensor, rows: int) -> Tensor:
    """Returns the low-resolution pixels around each place, for ``rows`` rows: ``(n, s)``."""
    step = lr.shape[2] // rows
    margin = (AROUND - step) // 2
    padded = F.pad(lr, (margin,) * 4, mode="reflect")
    patches = F.unfold(padded, AROUND, stride=step)
    return patches.movedim(1, 2).flatten(0, 1)


def explained(seen: Tensor, vectors: Tensor, *, tested: Tensor) -> float:
    """Returns the share of the variance of ``vectors`` ``(n, d)`` that a linear map of ``seen``
    ``(n, s)`` explains.

    The map is fitted by ridge regression on the places that are not ``tested`` ``(n,)``, and
    measured on those that are.
    """
    inputs, targets = F.pad(seen, (0, 1), value=1.0).double(), vectors.double()
    known, wanted = inputs[~tested], targets[~tested]
    gram = known.T @ known
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weights = torch.linalg.solve(gram + ridge, known.T @ wanted)
    missed = (targets[tested] - inputs[tested] @ weights).square().sum()
    spread = (targets[tested] - wanted.mean(dim=0)).square().sum()
    return float(1 - missed / spread)
