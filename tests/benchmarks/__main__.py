"""Measures everything, and writes the tables and images of `docs/benchmarks`.

    python -m tests.benchmarks                      # everything, about a quarter of an hour
    python -m tests.benchmarks --quick --output out # small sizes, to try it
    python -m tests.benchmarks --only search memory

Writes speed.json, speed.png and scaling.png, on a GPU with -cuda in their names, and the tables
of speed.md if the folder has one. With --only, rows of other parts stay if the file has them from
the same machine and commit, without changes; otherwise the file holds what was measured now.
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
    add("--quick", action="store_true", help="small sizes, to try it: measures nothing")
    add("--only", nargs="+", metavar="NAME", default=list(parts), help=f"of {', '.join(parts)}")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, metavar="N", help="of the CPU; by default those of torch")
    add("--output", type=Path, metavar="FOLDER", default=ROOT / "docs" / "benchmarks")
    add("--repeats", type=int, metavar="N", help="rounds of a row at most (30)")
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
    # Not before that is known; nor is `--help` in a hurry.
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
    except KeyboardInterrupt:  # before there was anything to keep, or twice
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
