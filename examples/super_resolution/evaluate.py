#!/usr/bin/env python
"""Measures 4x upscaling on images whose high-resolution version is known.

    python evaluate.py --photos photos --image side-by-side.png
    python evaluate.py --pairs Set14 --csv set14.csv

--photos takes large images and reduces them by 4 (Pillow, bicubic). --pairs takes a folder with the
subfolders HR and LR, in which the two images of a scene have the same name, or the small one's ends
in x4. An HR image that is up to 31 pixels too large is cut at the right and at the bottom.

Prints, for bicubic and for the model: PSNR in dB (higher is better), SSIM (higher is better), GMSD
(gradient magnitude similarity deviation, a measure of perceived quality; lower is better), and
detail, the energy at frequencies that the small image cannot hold, as a share of the original's.
All are on luma, without a border of 4 pixels. Bicubic has almost no detail; 1 is as much as the
original, though not necessarily the same. Read GMSD with detail: sharpening bicubic's edges also
improves GMSD, but adds no detail.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tvqrap.cli import UserError, at_least, ensure_writable_folder, run, share
from tvqrap.devices import device
from tvqrap.images.detail import detail_energy
from tvqrap.images.files import Photo, check_output_size, write_image
from tvqrap.images.layouts import SMALLEST_TILE, Blended
from tvqrap.images.levels import from_pillow, to_float, to_pillow
from tvqrap.images.pairs import Pair, pair_loaders, photo_loaders
from tvqrap.images.panels import NEAREST, contact_sheet, find_detail, upscale_by
from tvqrap.images.scores import Evaluation, Row, Scores, format_table, write_csv
from tvqrap.images.tiling import Upscaler, device_of, upscale_tiled
from tvqrap.models.assembly import SCALE
from tvqrap.models.weights import DEFAULT_WEIGHTS, load_super_resolver
from vqprior.metrics import CodebookUsage, gmsd, psnr, rgb_to_luma, ssim

BORDER = 4  # pixels left out at the border, as is usual in super-resolution
CROP = 64  # side of the details in the side-by-side image, in low-resolution pixels
ZOOM = 2  # their enlargement
SHOWN = 6  # scenes in the image


class PredictsCodes(Upscaler, Protocol):
    """A model whose codebook usage can be measured."""

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        ...

    def indices(self, lr: Tensor, /) -> Tensor:
        """Maps ``(b, 3, h, w)`` to the predicted indices; -1 for none."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    args = parse_arguments(arguments)
    loaders = pair_loaders(args.pairs) if args.pairs else photo_loaders(args.photos)
    _check_outputs(args.csv, args.image)
    model = load_super_resolver(args.weights).to(device("auto"))
    if args.texture is not None:
        model.texture_strength = args.texture
    failures: list[UserError] = []
    rows: list[list[tuple[str, Image.Image]]] = []

    def keep(pair: Pair, upscaled: Tensor, row: Row) -> None:
        if args.image and len(rows) < SHOWN:
            rows.append(side_by_side(pair, upscaled, row))

    pairs = _load(loaders[: args.limit], failures)
    evaluation = evaluate(model, pairs, tile=args.tile, each=keep)
    if not evaluation.rows:
        raise UserError("none of the images could be measured")
    print(format_table(evaluation))
    if args.csv:
        write_csv(args.csv, evaluation)
    if args.image:
        write_image(args.image, Photo(from_pillow(contact_sheet(rows))))
    return 1 if failures else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--pairs", type=Path, metavar="DIR", help="folder with subfolders HR and LR"
    )
    source.add_argument("--photos", type=Path, metavar="DIR", help="folder of large images")
    parser.add_argument(
        "--weights",
        type=Path,
        default=DEFAULT_WEIGHTS,
        metavar="FILE",
        help="weights written by train.py, or a checkpoint of the paper's authors (.pth) "
        "(default: weights/small.safetensors)",
    )
    parser.add_argument(
        "--texture",
        type=share,
        metavar="X",
        help="share of the predicted texture to add, from 0 to 1 (default: stored with the "
        "weights)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--image", type=Path, metavar="FILE", help="write details side by side")
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="use only the first N images"
    )
    parser.add_argument(
        "--tile",
        type=at_least(SMALLEST_TILE),
        metavar="N",
        help="side of a tile in low-resolution pixels (default: set by the model, mostly 256)",
    )
    return parser.parse_args(arguments)


def evaluate(
    model: PredictsCodes,
    pairs: Iterable[Pair],
    *,
    tile: int | None = None,
    each: Callable[[Pair, Tensor, Row], None] | None = None,
) -> Evaluation:
    """Upscales the small images and compares the results with the large ones.

    Measures the 8-bit levels that upscale.py would write.

    Args:
        model: A model in evaluation mode.
        pairs: The scenes; one at a time is held in memory.
        tile: See ``Blended``.
        each: Called after each scene with the pair, the model's ``(3, 4h, 4w)`` levels, and the
            scores.
    """
    evaluation = Evaluation(codebook_size=model.codebook_size)
    codes = CodebookUsage(model.codebook_size)
    for pair in pairs:
        start = time.perf_counter()
        upscaled = upscale_tiled(model, to_float(pair.lr), Blended(tile))
        seconds = time.perf_counter() - start
        bicubic = measure(_bicubic(pair.lr), pair.hr)
        row = Row(pair.name, bicubic, measure(upscaled, pair.hr), seconds)
        evaluation.rows.append(row)
        for indices in _indices(model, to_float(pair.lr), tile or model.tiling.default_tile):
            codes.update(indices)
        if each is not None:
            each(pair, upscaled, row)
    summary = codes.compute()
    evaluation.perplexity, evaluation.usage = summary.perplexity, summary.usage
    return evaluation


def measure(image: Tensor, original: Tensor) -> Scores:
    """Compares levels ``(3, h, w)`` with the original's, on luma, without the border."""
    inner = slice(BORDER, -BORDER)
    ours, theirs = (
        to_float(levels)[None, :, inner, inner].contiguous() for levels in (image, original)
    )
    luma, true_luma = rgb_to_luma(ours), rgb_to_luma(theirs)
    scores = (
        psnr(luma, true_luma),
        ssim(luma, true_luma),
        gmsd(ours, theirs),
        detail_energy(luma) / detail_energy(true_luma),
    )
    return Scores(*(float(score) for score in scores))


def side_by_side(pair: Pair, upscaled: Tensor, row: Row) -> list[tuple[str, Image.Image]]:
    """Shows the detail of a scene with most contrast: bicubic, model, original, with captions."""
    left, top, right, bottom = (side * SCALE for side in find_detail(to_pillow(pair.lr), CROP))
    box = (left, top, right, bottom)
    levels = {"bicubic": _bicubic(pair.lr), "model": upscaled, "original": pair.hr}
    captions = {
        "bicubic": f"{row.name}: bicubic, {_caption(row.bicubic)}",
        "model": f"model, {_caption(row.model)}",
        "original": "original",
    }
    return [
        (captions[kind], upscale_by(to_pillow(image).crop(box), ZOOM, NEAREST))
        for kind, image in levels.items()
    ]


def _check_outputs(*files: Path | None) -> None:
    """Checks that the results can be written, before any are computed."""
    for file in filter(None, files):
        ensure_writable_folder(file.parent)
        if file.is_dir():
            raise UserError(f"{file}: is a folder; pass the name of a file")
    if files[-1] is not None:
        check_output_size(files[-1], 1, 1)


def _load(loaders: Sequence[Callable[[], Pair]], failures: list[UserError]) -> Iterator[Pair]:
    """Reads one pair after the other; reports those that cannot be read and skips them."""
    for loader in tqdm(loaders, "images", unit="image", disable=None):
        try:
            pair = loader()
            if pair.note:
                tqdm.write(f"note: {pair.note}", file=sys.stderr)
            yield pair
        except UserError as error:
            failures.append(error)
            tqdm.write(f"error: {error}", file=sys.stderr)


def _bicubic(lr: Tensor) -> Tensor:
    return from_pillow(upscale_by(to_pillow(lr), SCALE))


@torch.no_grad()
def _indices(model: PredictsCodes, lr: Tensor, tile: int) -> Iterator[Tensor]:
    """Predicts the indices part by part; at the borders of parts the model sees less context."""
    for strip in lr.split(tile, dim=1):
        for part in strip.split(tile, dim=2):
            yield model.indices(part[None].to(device_of(model))).cpu()


def _caption(scores: Scores) -> str:
    return f"{scores.psnr:.2f} dB, GMSD {scores.gmsd:.3f}"


if __name__ == "__main__":
    sys.exit(run(main))
