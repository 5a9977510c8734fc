"""Compares what the first lines of each library learn: the same autoencoder, photos and batches.

    python -m tests.benchmarks.first_lines                    # all rows, about an hour on two cores
    python -m tests.benchmarks.first_lines --only plain --steps 800 --rates 2e-3

Trains a small autoencoder with each quantizer as it comes, once per seed, on crops of the photos in
examples/; prints PSNR on held-out parts of the photos and codebook usage on all parts, and writes
them to docs/benchmarks/first_lines.json and the tables of first_lines.md. With --only, the runs of
other quantizers are kept.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import vqprior
from tests.benchmarks import machine, peer, report, results
from tests.benchmarks.timing import Settings
from vqprior.functional import IndexBackpropagation
from vqprior.metrics import CodebookUsage

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "examples" / "super_resolution" / "photos"
OUTPUT = ROOT / "docs" / "benchmarks"
DIM, CROP, BATCH = 32, 64, 16
RATES, STEPS, SEEDS = (2e-3, 3e-4), (800, 3000), (0, 1)

Make = Callable[[], nn.Module]


def residual() -> vqprior.Quantizer:
    """Four stages of 256 codes."""
    return vqprior.ResidualQuantizer([vqprior.VectorQuantizer(DIM, 256) for _ in range(4)])


def cosine() -> vqprior.Quantizer:
    """The search compares directions in 8 dimensions."""
    vq = vqprior.VectorQuantizer(8, 1024, metric="cosine")
    return vqprior.ProjectedQuantizer(vq, nn.Linear(DIM, 8), nn.Linear(8, DIM))


def simvq() -> vqprior.Quantizer:
    """A linear map of frozen codes."""
    frozen = vqprior.EmbeddingCodebook(512, DIM).requires_grad_(requires_grad=False)
    codebook = vqprior.TransformedCodebook(frozen, nn.Linear(DIM, DIM))
    return vqprior.VectorQuantizer(DIM, 512, codebook=codebook)


def ibq(temperature: float) -> vqprior.Quantizer:
    """Normalized features and a gradient to all codes."""
    estimator = IndexBackpropagation(temperature=temperature)
    vq = vqprior.VectorQuantizer(DIM, 512, metric="dot", estimator=estimator)
    return vqprior.ProjectedQuantizer(vq, vqprior.nn.L2Norm(), nn.Identity())


def projected(quantizer: vqprior.Quantizer, *, normalize: bool = False) -> vqprior.Quantizer:
    """A quantizer of few features between two linear maps."""
    down: nn.Module = nn.Linear(DIM, quantizer.dim)
    if normalize:
        down = nn.Sequential(down, nn.LayerNorm(quantizer.dim, elementwise_affine=False))
    return vqprior.ProjectedQuantizer(quantizer, down, nn.Linear(quantizer.dim, DIM), dim=DIM)


class Line(NamedTuple):
    """One row of the table: a quantizer, and which of the other package it is compared with."""

    what: str
    ours: Make
    theirs: str


LINES = {
    "plain": Line(
        "`SelfUpdating(VectorQuantizer)`, 512 codes",
        lambda: vqprior.SelfUpdating(vqprior.VectorQuantizer(DIM, 512)),
        "VectorQuantize",
    ),
    "gradient": Line(
        "`VectorQuantizer`, 512 codes, no rule",
        lambda: vqprior.VectorQuantizer(DIM, 512),
        "VectorQuantize",
    ),
    "residual": Line(
        "`SelfUpdating(ResidualQuantizer)`, 4 x 256 codes",
        lambda: vqprior.SelfUpdating(residual()),
        "ResidualVQ",
    ),
    "cosine": Line(
        "`SelfUpdating(ProjectedQuantizer)`, cosine, 8 features, 1024 codes",
        lambda: vqprior.SelfUpdating(cosine()),
        "VectorQuantize-cosine",
    ),
}
RECIPES: dict[str, tuple[str, Make, int]] = {
    "simvq": ("SimVQ, 512 codes", simvq, 512),
    "simvq-fast": ("SimVQ, its map at 10 times the learning rate", simvq, 512),
    "ibq": ("IBQ, 512 codes", lambda: ibq(1.0), 512),
    "ibq-sharp": ("IBQ, temperature 0.05", lambda: ibq(0.05), 512),
    "lfq": ("LFQ, 12 bits", lambda: projected(vqprior.LFQ(12)), 4096),
    "lfq-normal": (
        "LFQ, 12 bits, LayerNorm, temperature 1, entropy 0.02, commitment 0",
        lambda: projected(
            vqprior.LFQ(
                12,
                commitment_weight=0.0,
                sample_entropy_weight=0.02,
                batch_entropy_weight=0.02,
                temperature=1.0,
            ),
            normalize=True,
        ),
        4096,
    ),
    "bsq": ("BSQ, 12 bits", lambda: projected(vqprior.BSQ(12)), 4096),
    "fsq": ("FSQ, 8 x 8 x 8 x 8 levels", lambda: projected(vqprior.FSQ([8, 8, 8, 8])), 4096),
}
THEIRS: dict[str, Callable[[Any], nn.Module]] = {
    "VectorQuantize": lambda vqp: vqp.VectorQuantize(dim=DIM, codebook_size=512),
    "ResidualVQ": lambda vqp: vqp.ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=256),
    "VectorQuantize-cosine": lambda vqp: vqp.VectorQuantize(
        dim=DIM, codebook_size=1024, codebook_dim=8, use_cosine_sim=True
    ),
}
SIZES = {"VectorQuantize": [512], "ResidualVQ": [256] * 4, "VectorQuantize-cosine": [1024]}


class Ours(nn.Module):
    """A quantizer of vqprior on feature maps."""

    def __init__(self, quantizer: vqprior.Quantizer) -> None:
        super().__init__()
        self.quantizer = vqprior.ChannelsFirst(quantizer)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns codes, indices ``(n, q)`` and the loss."""
        out = self.quantizer(features)
        return out.quantized, out.indices.reshape(-1, self.quantizer.num_codebooks), out.loss


class Theirs(nn.Module):
    """A quantizer of the other package on feature maps."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns codes, indices ``(n, q)`` and the loss."""
        tokens = features.movedim(1, -1).flatten(1, 2)
        quantized, indices, *loss = self.quantizer(tokens)
        quantized = quantized.unflatten(1, features.shape[2:]).movedim(-1, 1)
        total = sum((part.sum() for part in loss), torch.zeros(()))
        return quantized, indices.reshape(tokens.shape[0] * tokens.shape[1], -1), total


def autoencoder() -> tuple[nn.Module, nn.Module]:
    """Encodes 8 x 8 pixels to 32 features, and decodes them.

    With the skip connections it learns fast, so that the quantizer is what limits the result.
    """
    block = vqprior.nn.ResidualBlock
    encoder = nn.Sequential(
        nn.PixelUnshuffle(8), nn.Conv2d(192, 64, 1), block(64), nn.Conv2d(64, DIM, 1)
    )
    decoder = nn.Sequential(
        nn.Conv2d(DIM, 64, 1), block(64), nn.Conv2d(64, 192, 1), nn.PixelShuffle(8)
    )
    return encoder, decoder


def load(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the upper three quarters of each photo to train on, and the lower ones to test."""
    upper, lower = [], []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
            continue
        photo = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        cut = photo.shape[1] - max(photo.shape[1] // 4, CROP)
        if cut >= CROP and photo.shape[2] >= CROP:
            upper.append(photo[:, :cut])
            lower.append(photo[:, cut:])
    return upper, lower


def crops(count: int, rng: np.random.Generator, photos: list[Tensor]) -> Tensor:
    """Random crops ``(count, 3, 64, 64)`` in [0, 1]."""
    chosen = []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        top, left = (int(rng.integers(side - CROP + 1)) for side in photo.shape[1:])
        chosen.append(photo[:, top : top + CROP, left : left + CROP])
    return torch.stack(chosen).float() / 255


class Job(NamedTuple):
    """One training."""

    quantizer: str  # a key of LINES or of THEIRS
    rate: float
    steps: int
    seed: int
    photos: Path


def train(job: Job) -> dict[str, Any]:
    """Trains one autoencoder; returns PSNR, and usage and perplexity of the codebook used least."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    rng = np.random.default_rng(job.seed)
    upper, lower = load(job.photos)
    encoder, decoder = autoencoder()
    name = job.quantizer
    if name in THEIRS:
        quantizer, sizes = Theirs(THEIRS[name](peer.load())), SIZES[name]
    elif name in RECIPES:
        quantizer, sizes = Ours(RECIPES[name][1]()), [RECIPES[name][2]]
    else:
        quantizer, sizes = Ours(LINES[name].ours()), SIZES[LINES[name].theirs]
    model = nn.ModuleList([encoder, decoder, quantizer])
    rates = {True: 10 * job.rate, False: job.rate}
    groups = [
        {"params": [parameter], "lr": rates[name == "simvq-fast" and ".module." in key]}
        for key, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.Adam(groups)
    for _ in range(job.steps):
        image = crops(BATCH, rng, upper)
        quantized, _, loss = quantizer(encoder(image))
        loss = F.mse_loss(decoder(quantized), image) + loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    rng, errors, columns = np.random.default_rng(1), [], []
    with torch.no_grad():
        for _ in range(16):
            image = crops(32, rng, lower)
            quantized, indices, _ = quantizer(encoder(image))
            errors.append(F.mse_loss(decoder(quantized), image))
            columns += [indices, quantizer(encoder(crops(32, rng, upper)))[1]]
    psnr = -10 * torch.stack(errors).mean().log10().item()
    used, perplexities = [], []
    for column, size in zip(torch.cat(columns).unbind(1), sizes, strict=True):
        meter = CodebookUsage(size)
        meter.update(column)
        used.append(meter.compute().usage)
        perplexities.append(meter.compute().perplexity)
    return {**job._asdict(), "photos": None, "psnr": psnr, "usage": min(used),
            "perplexity": min(perplexities)}  # fmt: skip


def rows(trained: list[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table: the mean of the seeds, and the smallest usage."""
    settings = sorted({(run["steps"], -run["rate"]) for run in trained})
    cells = []
    for (name, line), (steps, rate) in itertools.product(LINES.items(), settings):
        sides = [
            [
                run
                for run in trained
                if (run["quantizer"], run["steps"], -run["rate"]) == (quantizer, steps, rate)
            ]
            for quantizer in (name, line.theirs)
        ]
        if not all(sides):
            continue
        psnr = [np.mean([run["psnr"] for run in side]) for side in sides]
        text = [
            f"{mean:.2f} dB, {min(run['usage'] for run in side):.0%}"
            for mean, side in zip(psnr, sides, strict=True)
        ]
        cells.append([line.what, f"{steps}, {-rate:g}", *text, f"{psnr[0] - psnr[1]:+.2f} dB"])
    return cells


def recipes(trained: list[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table of other quantizers: PSNR, usage and perplexity."""
    cells = []
    for name, (what, _, _) in RECIPES.items():
        runs = [run for run in trained if run["quantizer"] == name]
        if runs:
            psnr, usage, perplexity = (
                np.mean([run[key] for run in runs]) for key in ("psnr", "usage", "perplexity")
            )
            cells.append([what, f"{psnr:.2f} dB", f"{usage:.0%}", f"{perplexity:.0f}"])
    return cells


def kept(path: Path, *replaced: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the earlier runs in ``path`` but those of the quantizers that are trained now."""
    if not path.exists():
        return []
    names = set().union(*replaced)
    return [run for run in json.loads(path.read_text())["runs"] if run["quantizer"] not in names]


def main() -> None:
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.first_lines", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    names = [*LINES, *RECIPES]
    add("--only", nargs="+", choices=names, default=names, help="rows (default: all)")
    add("--rates", nargs="+", type=float, default=RATES, help="learning rates (default: both)")
    add("--steps", nargs="+", type=int, default=STEPS, help="training steps (default: both)")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="seeds (default: 0 1)")
    add("--photos", type=Path, default=PHOTOS, help="folder of photos (default: the bundled ones)")
    add("--workers", type=int, default=2, help="processes, of one thread each (default: 2)")
    add("--output", type=Path, default=OUTPUT, help="folder of the results (default: docs)")
    options = parser.parse_args()
    if peer.version() is None:
        sys.exit(f"error: {peer.MISSING}")
    if not load(options.photos)[0]:
        sys.exit(f"error: --photos {options.photos}: there is no photo of {2 * CROP} pixels a side")
    lines = [name for name in options.only if name in LINES]
    quantizers = dict.fromkeys(name for line in lines for name in (line, LINES[line].theirs))
    alone = [name for name in options.only if name in RECIPES]
    settings = [
        *itertools.product(quantizers, options.rates, options.steps, options.seeds),
        *itertools.product(alone, options.rates[:1], options.steps[:1], options.seeds),
    ]
    jobs = [Job(*setting, options.photos) for setting in settings]
    jobs.sort(key=lambda job: job.steps)  # the short ones first: a mistake shows early
    commit = machine.commit()
    trained = kept(options.output / "first_lines.json", quantizers, alone)
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for run in tqdm(pool.imap_unordered(train, jobs), total=len(jobs), unit="training"):
            trained.append({**run, "commit": commit})
            tqdm.write(
                f"{run['quantizer']:14s} rate {run['rate']:g}, {run['steps']} steps, seed "
                f"{run['seed']}: {run['psnr']:.2f} dB, usage {run['usage']:.1%}, perplexity "
                f"{run['perplexity']:.0f}"
            )
    head = ["quantizer", "steps, learning rate", "vqprior", peer.PEER, "difference"]
    table = report.table(head, rows(trained))
    others = report.table(["quantizer", "PSNR", "in use", "perplexity"], recipes(trained))
    print(table, others, sep="\n\n")
    about = {"machine": machine.describe(Settings(threads=1)), "photos": options.photos.name}
    text = json.dumps({**about, "runs": trained}, indent=1) + "\n"
    results.write(options.output / "first_lines.json", lambda path: path.write_text(text))
    report.rewrite(options.output / "first_lines.md", "first lines", table)
    report.rewrite(options.output / "first_lines.md", "recipes", others)


if __name__ == "__main__":
    main()
