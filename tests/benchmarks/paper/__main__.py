"""Measures the paper's super-resolver, and writes the tables of `docs/benchmarks/paper.md`.

python -m tests.benchmarks.paper                      # about 20 minutes on two cores
python -m tests.benchmarks.paper --quick --output out # a small model, to try the command
python -m tests.benchmarks.paper --only work speed
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from tests.benchmarks import machine, report, results
from tests.benchmarks.machine import ROOT
from tests.benchmarks.paper.measures import CASES, PARTS_IN_ORDER, Case
from tests.benchmarks.timing import Measured, Settings

INTERRUPTED = 130
CODE = ("vqprior", "examples", "tests/benchmarks")


def main(arguments: list[str] | None = None) -> int:
    """Measures, and returns the exit status."""
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch finds no GPU", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads or torch.get_num_threads())
    settings = Settings(
        device=options.device,
        threads=torch.get_num_threads(),
        repeats=3 if options.quick else 15,
        seconds=5.0 if options.quick else 60.0,
        quick=options.quick,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    cases = [c for c in CASES if c.part in options.only and c.needs in ("", options.device)]
    measured, status = {**results.begin(settings), "commit": machine.commit(*CODE)}, 0
    try:
        with tqdm(cases, file=sys.stderr, disable=None, unit="row") as bar:
            for case in bar:
                results.add(measured, row_of(case, settings))
                tqdm.write(report.line(measured["rows"][-1]))
                sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
        print(f"interrupted: {len(measured['rows'])} rows are kept", file=sys.stderr)
    if measured["rows"]:
        name = "paper-cuda" if options.device == "cuda" else "paper"
        results.save(measured, options.output / f"{name}.json")
        report.rewrite(options.output / "paper.md", name, render(measured))
    failed = any(row["note"].startswith("failed") for row in measured["rows"])
    return status or int(failed)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.paper", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--quick", action="store_true", help="use a small model, to try the command")
    add("--only", nargs="+", choices=PARTS_IN_ORDER, default=list(PARTS_IN_ORDER), metavar="NAME",
        help=f"parts to measure: {', '.join(PARTS_IN_ORDER)} (default: all)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="device to measure (default: cpu)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="number of CPU threads (default: torch's)")
    add("--output", type=Path, metavar="FOLDER", default=ROOT / "docs" / "benchmarks",
        help="folder of the results (default: docs/benchmarks)")  # fmt: skip
    return parser.parse_args(arguments)


def row_of(case: Case, settings: Settings) -> results.Row:
    """Measures one row; a failure must not stop the other rows."""
    try:
        measured = case.measure(settings)
    except Exception as error:  # of whatever kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        measured = Measured("", None, note=f"failed: {reason}")
    target = None if case.target is None else dict(zip(("bound", "of"), case.target, strict=True))
    names = {"part": case.part, "what": case.what, "sizes": {}, "against": case.against}
    return {**names, "target": target, **dataclasses.asdict(measured)}


def render(measured: results.Results) -> str:
    """Returns the text between the markers of the page."""
    blocks = [report.head(measured)] + ([report.QUICK] if measured["quick"] else [])
    titles = ["what", "against", "result (quartiles)", "target", "ours", "other", "note"]
    cells = []
    for row in measured["rows"]:
        both = ["", ""] if row["seconds"] is None else [report.seconds(s) for s in row["seconds"]]
        what = f"{row['part']}: {row['what']}"
        judged = report.judged(row, judge=not measured["quick"])
        cells.append([what, row["against"], report.outcome(row), judged, *both, row["note"]])
    return "\n\n".join([*blocks, report.table(titles, cells)])


if __name__ == "__main__":
    sys.exit(main())
