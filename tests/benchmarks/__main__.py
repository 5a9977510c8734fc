"""Measures time and memory, and writes the tables and images of `docs/benchmarks`.

    python -m tests.benchmarks                      # all parts, about a quarter of an hour
    python -m tests.benchmarks --quick --output out # small sizes, to try the command
    python -m tests.benchmarks --only search memory

Writes speed.json, speed.png and scaling.png (with -cuda in their names on a GPU), and the tables
of speed.md if the folder has that page. With --only, rows of other parts are kept if they are from
the same machine and the same clean commit; otherwise the file holds only the new rows.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERRUPTED = 130
NEEDED = ("torch", "matplotlib", "tqdm")


def parse_arguments(arguments: list[str] | None, parts: tuple[str, ...]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--quick", action="store_true", help="use small sizes, to try the command")
    add("--only", nargs="+", metavar="NAME", default=list(parts),
        help=f"parts to measure: {', '.join(parts)} (default: all)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="device to measure (default: cpu)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="number of CPU threads (default: torch's)")
    add("--output", type=Path, metavar="FOLDER", default=ROOT / "docs" / "benchmarks",
        help="folder of the results (default: docs/benchmarks)")  # fmt: skip
    add("--repeats", type=int, metavar="N",
        help="largest number of rounds per row (default: 30; with --quick: 3)")  # fmt: skip
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in parts]
    if unknown:
        _leave(f"--only {' '.join(unknown)}: there is no such part; there are {', '.join(parts)}")
    for name in ("threads", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            _leave(f"--{name} {value}: must be at least 1")
    return options


def _leave(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> int:
    """Measures, and returns the exit status."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _leave(f'{", ".join(missing)} not installed: pip install -e ".[test,peers]"')
    # Imported only after this check.
    import torch

    from tests.benchmarks import runner
    from tests.benchmarks.cases import PARTS_IN_ORDER
    from tests.benchmarks.timing import Settings

    options = parse_arguments(arguments, PARTS_IN_ORDER)
    if options.device == "cuda" and not torch.cuda.is_available():
        _leave("--device cuda: torch finds no GPU")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    settings = Settings(
        device=options.device,
        threads=torch.get_num_threads(),
        repeats=options.repeats or (3 if options.quick else 30),
        quick=options.quick,
    )
    try:
        return runner.run(settings, set(options.only), options.output)
    except OSError as error:
        print(f"error: {options.output}: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first row, or a second time
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
