#!/usr/bin/env python
"""Upscales images 4 times.

    python upscale.py holiday/ cat.png 'scans/*.jpg' --output large --compare

Writes PNG files of the same names unless --format says otherwise, and replaces no existing file
without --overwrite. If an image cannot be upscaled, one line says why, the others are upscaled, and
the exit status is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tvqrap.cli import (
    UsageError,
    UserError,
    at_least,
    check_free_space,
    describe,
    ensure_writable_folder,
    run,
    share,
)
from tvqrap.devices import device
from tvqrap.images.files import Photo, check_output_size, read_image, write_image
from tvqrap.images.inputs import collect_inputs
from tvqrap.images.jobs import Job, check_job, identity_of, plan_jobs
from tvqrap.images.layouts import SMALLEST_TILE, Averaged, Blended, Layout
from tvqrap.images.levels import from_pillow, upscale_plane
from tvqrap.images.panels import comparison
from tvqrap.images.tiling import DEFAULT_LAYOUT, Upscaler, upscale_tiled
from tvqrap.models.prepared import PRECISIONS, Prepared
from tvqrap.models.weights import DEFAULT_WEIGHTS, load_super_resolver

SMALLEST_SIDE = 8
LARGEST_RESULT = 1000  # megapixels, of a photo of 62


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    args = parse_arguments(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    sources = collect_inputs(args.inputs)
    jobs = plan_jobs(sources, args.output, args.format, compare=args.compare)
    model = load_super_resolver(args.weights).to(args.device)
    if args.texture is not None:
        model.texture_strength = args.texture
    model = Prepared(model, precision=args.precision, compiled=args.compile)
    layout = pick_layout(args.layout, args.tile)
    ensure_writable_folder(args.output)
    inputs = {identity_of(source) for source in sources}
    written = 0
    with tqdm(jobs, "images", unit="image", disable=None) as bar:
        for job in bar:
            try:
                check_job(job, inputs, overwrite=args.overwrite)
                upscale_file(model, job, layout, args.batch, limit=args.limit)
                written += 1
            except UsageError:
                raise  # the next image would fail in the same way
            except (UserError, MemoryError) as error:
                tqdm.write(f"error: {_with_name(job.source, error)}", file=sys.stderr)
    print(f"{written} of {len(jobs)} images upscaled, in {args.output}")
    return 0 if written == len(jobs) else 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="files, folders or glob patterns"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the results, created if missing",
    )
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
        help="share of the predicted texture to add: 0 is most faithful, 1 has most detail "
        "(default: stored with the weights)",
    )
    parser.add_argument(
        "--layout",
        choices=("blended", "averaged"),
        default="blended",
        help="how tiles join: blended linearly, or the paper's larger tiles, averaged where they "
        "overlap (default: %(default)s)",
    )
    parser.add_argument(
        "--tile",
        type=at_least(SMALLEST_TILE),
        metavar="N",
        help="side of a tile in input pixels; smaller tiles need less memory (default: set by the "
        f"model, mostly 256; averaged: {Averaged.tile})",
    )
    parser.add_argument(
        "--batch",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of tiles to upscale at once; more can be faster on a GPU "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        default=LARGEST_RESULT,
        metavar="MP",
        help="largest result in megapixels; beside what the model needs, a PNG file takes up to 6 "
        "bytes of memory a pixel, 8 with transparency, twice as much with 16 bits, and other "
        "formats up to 20 (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="float32",
        help="precision of the network; bfloat16 is faster where the hardware supports it "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network; for many images on a GPU"
    )
    parser.add_argument(
        "--format",
        choices=("png", "jpg", "webp"),
        default="png",
        help="file format of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also write NAME_comparison.png, which shows the result beside bicubic",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="number of CPU threads")
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="NAME",
        help="device to compute on: cpu, mps, cuda, or one of several GPUs, as cuda:1; auto takes "
        "a CUDA GPU if there is one (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def pick_layout(name: str, tile: int | None) -> Layout:
    """Returns the layout of that name; ``tile`` replaces its default tile size."""
    if name == "blended":
        return Blended(tile)
    return Averaged() if tile is None else Averaged.of_size(tile)


def upscale_file(
    model: Upscaler,
    job: Job,
    layout: Layout = DEFAULT_LAYOUT,
    batch: int = 1,
    *,
    limit: int = LARGEST_RESULT,
) -> None:
    """Reads, upscales and writes one image, and prints a line.

    Raises:
        UserError: If the image cannot be read, is too small or too large, or the result cannot be
            written.
    """
    check_size = partial(check_input_size, scale=model.tiling.scale, limit=limit)
    photo = read_image(job.source, check_size=check_size)
    width, height = (side * model.tiling.scale for side in photo.size)
    check_output_size(job.result, width, height)
    deep = job.result.suffix == ".png" and photo.bit_depth == 16
    channels = 3 if photo.alpha is None else 4
    check_free_space(job.result.parent, width * height * channels * (2 if deep else 1))
    for note in photo.notes:
        tqdm.write(f"note: {job.source}: {note}", file=sys.stderr)
    result = upscale_photo(model, photo, layout, batch, deep=deep)
    if photo.bit_depth == 16 and not deep:
        tqdm.write(
            f"note: {job.source}: 16 bits are rounded to 8, which --format png would keep",
            file=sys.stderr,
        )
    if result.alpha is not None and job.result.suffix == ".jpg" and photo.alpha.min() < 1:
        tqdm.write(
            f"note: {job.source}: JPEG has no transparency; blended onto white", file=sys.stderr
        )
    write_image(job.result, result)
    tqdm.write(f"{job.source} -> {job.result} ({width}x{height})")
    if job.comparison is not None:
        write_image(job.comparison, Photo(from_pillow(comparison(photo, result))))
        tqdm.write(f"{job.source} -> {job.comparison}")


def check_input_size(
    width: int, height: int, *, scale: int = 4, limit: int = LARGEST_RESULT
) -> None:
    """Raises ``UserError`` for an image that is too small, or whose result would be too large."""
    if min(width, height) < SMALLEST_SIDE:
        raise UserError(
            f"is {width}x{height}; the smallest size is {SMALLEST_SIDE}x{SMALLEST_SIDE}"
        )
    pixels = width * height * scale**2
    if pixels > limit * 1e6:
        raise UserError(
            f"is {width}x{height}, so the result would have {pixels / 1e6:.1f} megapixels; the "
            f"limit is {limit}. Crop it or make it smaller first, or pass a larger --limit"
        )


def upscale_photo(
    model: Upscaler,
    photo: Photo,
    layout: Layout = DEFAULT_LAYOUT,
    batch: int = 1,
    *,
    deep: bool = True,
) -> Photo:
    """Upscales colors with the model, and alpha with bicubic interpolation.

    Args:
        model: See ``Upscaler``.
        photo: The result of ``read_image``.
        layout: See ``upscale_tiled``.
        batch: See ``upscale_tiled``.
        deep: Whether to keep 16 bits for 16-bit images; the result has 8 without.
    """
    dtype = torch.uint16 if deep and photo.bit_depth == 16 else torch.uint8
    rgb, alpha = photo.rgb, photo.alpha
    if alpha is not None:
        rgb = spread_color(rgb, alpha)
        alpha = upscale_plane(alpha, model.tiling.scale, dtype)
    with tqdm(desc="tiles", unit="tile", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        rgb = upscale_tiled(model, rgb, layout, batch=batch, dtype=dtype, progress=progress)
    return replace(photo, rgb=rgb, alpha=alpha, bit_depth=8 * dtype.itemsize)


def spread_color(rgb: Tensor, alpha: Tensor, reach: int = 8) -> Tensor:
    """Gives invisible pixels the colors of visible pixels near them.

    Files hold any color there, often black, which upscaling would mix into visible edges.
    """
    window = 2 * reach + 1
    near = F.avg_pool2d(torch.cat([rgb * alpha, alpha]), window, 1, reach)
    color = near[:3] / near[3:].clamp_min(1e-6)
    return torch.where((alpha == 0) & (near[3:] > 1e-6), color, rgb)


def _with_name(source: Path, error: BaseException) -> str:
    text = describe(error)
    return text if text.startswith(f"{source}: ") else f"{source}: {text}"


if __name__ == "__main__":
    sys.exit(run(main))
