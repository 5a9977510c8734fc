"""Compares priors on photos: tests claims of the TVQ&RAP paper and questions of its reviewers.

Trains small models that differ only in their prior, and measures them on held-out photos:

  sizes       codebook sizes: plain, with a skip connection, and for texture given a structure that
              is encoded or comes from the low-resolution image
  equal-bits  residual, grouped, multi-scale, scalar and binary quantizers at 12 bits a place
  prediction  when reconstruction-aware prediction helps
  gradients   how close its estimated gradients are to the exact one
  stride      resolution of an encoded structure

Finished rows stay in --out and are not trained again, so the same command continues an interrupted
study. Commands with different --only can share a folder and run in parallel.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from study.plan import EXPERIMENTS, QUICK, Extent, planned
from study.report import read_content, write_report
from study.runner import Runner, read_result
from study.setting import Setting
from study.table import Row
from tvqrap.cli import at_least, ensure_writable_folder, run
from tvqrap.devices import device
from tvqrap.training.options import positive


def main(arguments: list[str] | None = None) -> int | None:
    """Trains and measures missing rows, and writes the report."""
    options = parse_options(arguments)
    extent = QUICK if options.quick else Extent()
    scale, seeds = options.scale * extent.scale, options.seeds or extent.seeds
    extent = replace(extent, seeds=seeds, scale=scale)
    rows = planned(extent, options.only)
    if options.list:
        print("\n".join(row.name for row in rows))
        return
    ensure_writable_folder(options.out)
    other = None if options.against is None else read_content(options.against)
    if not options.report:
        compute(rows, options)
    print(write_report(options.out, extent, page=options.page, other=other))


def compute(rows: list[Row], options: argparse.Namespace) -> None:
    """Trains and measures the rows that are missing, and prints a line for each."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    setting = Setting(
        options.photos, options.val, most=options.held_out, device=options.device,
        precision=options.precision,
    )  # fmt: skip
    runner = Runner(options.out, setting)
    for row in tqdm(rows, "rows", disable=None):
        if read_result(options.out, row) is None:
            result = runner.result(row)
            psnr = f"  {result['psnr']:.2f} dB" if "psnr" in result else ""
            tqdm.write(f"{row.name}{psnr}  {result['seconds']:.0f} s", file=sys.stderr)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", type=Path, metavar="DIR", help="photos to train on")
    add("--val", type=Path, metavar="DIR",
        help="held-out photos to measure on, at their middle 128 x 128 pixels")  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR", help="output folder")
    add("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="QUESTION",
        help=f"questions to answer: {', '.join(EXPERIMENTS)} (default: all)")  # fmt: skip
    add(
        "--quick",
        action="store_true",
        help="run a small part of the study, in 6.5 minutes on two threads",
    )
    add("--seeds", type=at_least(1), metavar="N",
        help="number of trainings per row (default: 3; with --quick: 1)")  # fmt: skip
    add("--scale", type=positive, default=1.0, metavar="X",
        help="factor of all numbers of steps (default: 1)")  # fmt: skip
    add("--held-out", type=at_least(2), default=50, metavar="N",
        help="largest number of photos of --val to measure on (default: 50)")  # fmt: skip
    add("--precision", default="float32", choices=("float32", "bfloat16"),
        help="precision of the networks in training (default: float32)")  # fmt: skip
    add("--device", type=device, default="auto",
        help="cuda or cpu (default: cuda if available)")  # fmt: skip
    add("--threads", type=at_least(1), metavar="N", help="number of CPU threads")
    add("--report", action="store_true", help="only report on finished rows")
    add("--page", type=Path, metavar="FILE.md",
        help="also write the tables into this page, and the numbers beside it")  # fmt: skip
    add("--against", type=Path, metavar="FILE.json",
        help="also compare with another study: rows.json of its --out")  # fmt: skip
    add("--list", action="store_true", help="only list the names of the rows")
    options = parser.parse_args(arguments)
    if not (options.report or options.list) and (options.photos is None or options.val is None):
        parser.error("give --photos and --val")
    return options


if __name__ == "__main__":
    sys.exit(run(main))
