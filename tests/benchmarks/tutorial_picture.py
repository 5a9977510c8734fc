"""Runs the blocks of docs/tutorial.md with more steps, and renews its picture and output.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.tutorial_picture --steps 1500

What each block prints replaces the text block below it. Takes a few minutes on one CPU thread.
"""

import argparse
import contextlib
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "tutorial.md", DOCS / "images" / "tutorial.png"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
STEPS = re.compile(r"^steps = \d+", re.MULTILINE)


def renew(steps: int) -> None:
    """Executes the page and writes its output and its picture."""
    names: dict[str, object] = {"__name__": "__main__"}

    def execute(block: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(STEPS.sub(f"steps = {steps}", block[1]), names)
        output = printed.getvalue()
        shown = f"\n```text\n{output}```\n" if output else ""
        print(output, end="", flush=True)
        return f"```python\n{block[1]}```\n{shown}"

    text = PAGE.read_text()
    if len(STEPS.findall(text)) != 1:
        raise ValueError(f"`steps` must be set once in {PAGE}.")
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            text = BLOCK.sub(execute, text)
            shutil.copy("tutorial.png", PICTURE)
        finally:
            os.chdir(start)
    PAGE.write_text(text)


def main() -> None:
    """Renews the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=1500, help="training steps (default: %(default)s)")
    add("--threads", type=int, default=1, help="number of CPU threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    renew(options.steps)


if __name__ == "__main__":
    main()
