"""Runs the cases, and writes the finished rows."""

import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from tests.benchmarks import figures, peer, report, results
from tests.benchmarks.cases import CASES, Case
from tests.benchmarks.results import Results
from tests.benchmarks.timing import Measured, Settings

INTERRUPTED = 130


def run(settings: Settings, parts: set[str], folder: Path) -> int:
    """Measures the rows of ``parts``, writes the files of ``folder``, returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass  # fails now if the folder cannot be written to
    torch.backends.cuda.matmul.allow_tf32 = False
    there = {"": True, "peer": peer.version() is not None, "cuda": settings.device == "cuda"}
    if not there["peer"]:
        print(peer.MISSING, file=sys.stderr)
    cases = [case for case in CASES if case.part in parts and there[case.needs]]
    measured, done, status = results.begin(settings), set(), 0
    try:
        with tqdm(cases, file=sys.stderr, disable=None, unit="row") as bar:
            for case in bar:
                if case.part not in done:
                    tqdm.write(report.heading(case.part, case.against))
                done.add(case.part)
                row, failed = _row(case, settings)
                results.add(measured, row)
                tqdm.write(report.line(measured["rows"][-1]))
                sys.stdout.flush()
                status |= failed
    except KeyboardInterrupt:
        status = INTERRUPTED
    path = folder / f"{name_of(settings)}.json"
    finished = len(measured["rows"])
    if finished:
        results.keep(measured, path, done)
        publish(measured, path)
    if status == INTERRUPTED:
        print(
            f"interrupted: {finished} of {len(cases)} rows are finished and kept", file=sys.stderr
        )
    return status


def name_of(settings: Settings) -> str:
    """Returns the stem of the file of results."""
    return "speed-cuda" if settings.device == "cuda" else "speed"


def publish(measured: Results, path: Path) -> None:
    """Writes the file, the images and the tables of the page."""
    results.save(measured, path)
    figures.draw_ratios(measured, path.with_suffix(".png"))
    figures.draw_scaling(measured, path.with_name(f"{path.stem.replace('speed', 'scaling')}.png"))
    report.rewrite(path.with_name("speed.md"), path.stem, report.render(measured))


def _row(case: Case, settings: Settings) -> tuple[results.Row, bool]:
    """Returns the row, and whether it failed: a failure must not stop the other rows."""
    try:
        return case.run(settings), False
    except Exception as error:  # of whatever kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return case.row(case.sizes, Measured("", None, note=f"failed: {reason}")), True
