"""Compares priors on photos: what the paper of TVQ&RAP claims, and what its reviewers asked.

Trains small models that differ in their prior alone, one after the other, and measures them on
photos that they were not trained on:

  sizes       how good is a codebook of how many codes, plain, with a skip connection, and for
              texture, whose structure is encoded or comes from the low-resolution image
  equal-bits  how good are residual, grouped, multi-scale, scalar and binary quantizers
  prediction  when does reconstruction-aware prediction help
  gradients   how near are its estimated gradients to the exact one
  stride      how coarse should an encoded structure be

Whatever is finished stays in --out and is not done again, so the study can be interrupted and
continued by the same command. Commands with other --only may share a folder and run beside it.
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
from tvqrap.training.options import device, positive


def main(arguments: list[str] | None = None) -> int | None:
    """Does what is missing of the study, and reports."""
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
    """Does what is missing of rows; one line tells of each."""
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
        help="other photos to measure on; of each, the middle 128 x 128 pixels")  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR", help="where everything goes")
    add("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="QUESTION",
        help=f"which of {', '.join(EXPERIMENTS)} (all)")  # fmt: skip
    add("--quick", action="store_true", help="a small part of the study, in 10 minutes")
    add("--seeds", type=at_least(1), metavar="N", help="train each row N times (3; --quick 1)")
    add("--scale", type=positive, default=1.0, metavar="X",
        help="multiply all numbers of steps (1)")  # fmt: skip
    add("--held-out", type=at_least(2), default=50, metavar="N",
        help="measure on N photos of --val at most (50)")  # fmt: skip
    add("--precision", default="float32", choices=("float32", "bfloat16"),
        help="of the networks in training (float32)")  # fmt: skip
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")  # fmt: skip
    add("--threads", type=at_least(1), metavar="N", help="CPU threads to use")
    add("--report", action="store_true", help="only report on what is finished")
    add("--page", type=Path, metavar="FILE.md",
        help="also put tables into a page, and numbers beside it")  # fmt: skip
    add("--against", type=Path, metavar="FILE.json",
        help="also tell how far from another study: rows.json of its --out")  # fmt: skip
    add("--list", action="store_true", help="only list the names of the rows")
    options = parser.parse_args(arguments)
    if not (options.report or options.list) and (options.photos is None or options.val is None):
        parser.error("give --photos and --val")
    return options


if __name__ == "__main__":
    sys.exit(run(main))
