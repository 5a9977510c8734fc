"""Measures the peak memory of one call above the memory before it, in a fresh process.

    python -m tests.benchmarks.memory '{"kind": "training, ours", "device": "cpu", "threads": 1,
                                        "sizes": {"n": 4096, "k": 8192, "d": 64}}'

prints the bytes. The benchmarks start this command.
"""

import dataclasses
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import sides
from tests.benchmarks.machine import ROOT, free_bytes
from tests.benchmarks.sides import Step
from tests.benchmarks.timing import Measured, Settings, wait

MIB, GIB = 1 << 20, 1 << 30
FLOAT = 4  # bytes
# Bytes per entry of the other package's matrices of n x k, to check that memory suffices.
ENTRY_BYTES = 32


def _ours(train: bool) -> Callable[..., Step]:
    def build(device: str, **sizes: int) -> Step:
        data = sides.tokens(device, **sizes)
        quantizer = sides.ours(data).to(device)
        if not train:
            return sides.evaluate_ours(quantizer, data.x)
        return sides.train_ours(quantizer, data.x, data.direction)

    return build


def _theirs(train: bool) -> Callable[..., Step]:
    def build(device: str, **sizes: int) -> Step:
        data = sides.tokens(device, **sizes)
        quantizer = sides.theirs(data)
        if not train:
            return sides.evaluate_theirs(quantizer, data.x)
        return sides.train_theirs(quantizer, data.x, data.direction)

    return build


def _select(step: Callable[..., Step]) -> Callable[..., Step]:
    return lambda device, **sizes: step(*sides.choices(device, **sizes))


KINDS: dict[str, Callable[..., Step]] = {
    "training, ours": _ours(train=True),
    "eval, ours": _ours(train=False),
    "training, theirs": _theirs(train=True),
    "eval, theirs": _theirs(train=False),
    "select, ours": _select(sides.select_ours),
    "select, textbook": _select(sides.select_textbook),
}


@dataclasses.dataclass(frozen=True)
class Peak:
    """Measures one of ``KINDS`` in its own process."""

    kind: str

    def __call__(self, settings: Settings, **sizes: int) -> Measured:
        needed = ENTRY_BYTES * sizes["n"] * sizes["k"] if self.kind.endswith("theirs") else 0
        free = free_bytes(settings.device)
        if free is not None and free < needed:
            note = f"left out: needs {needed / GIB:.0f} GiB of free memory, has {free / GIB:.1f}"
            return Measured("MiB", None, note=note)
        spec = {"kind": self.kind, "device": settings.device, "threads": settings.threads}
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.memory", json.dumps({**spec, "sizes": sizes})],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise RuntimeError(f"the process that measured memory failed: {reason}")
        extra = json.loads(done.stdout.splitlines()[-1])
        if self.kind.startswith("select"):  # without the gradient of the logits, which is an output
            extra -= sizes["n"] * sizes["k"] * FLOAT
        return Measured("MiB", extra / MIB)


def beyond_fixed(rows: list[dict[str, Any]]) -> None:
    """Adds notes on how memory grows with the tokens, relative to the fewest tokens of a step.

    The unit is a tensor of n x d float32 numbers, the size of outputs and gradients.
    """
    for row in rows:
        same = [r for r in rows if r["what"] == row["what"] and r["value"] is not None]
        first = min(same, key=lambda r: r["sizes"]["n"], default=row)
        more = row["sizes"]["n"] - first["sizes"]["n"]
        if row["value"] is not None and more > 0:
            tensor = more * row["sizes"]["d"] * FLOAT / MIB
            grown = (row["value"] - first["value"]) / tensor
            row["note"] = f"{grown:.1f} tensors n x d for each token beyond {first['sizes']['n']:,}"


def measure(kind: str, device: str, sizes: dict[str, int]) -> int:
    """Returns the bytes at the peak of one call minus those before it."""
    KINDS[kind](device, **{**sizes, "n": 64, "k": 16})()  # loads libraries
    step = KINDS[kind](device, **sizes)
    gc.collect()
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    before = _forget_peak()
    step()
    return _peak() - before


def _forget_peak() -> int:
    """Returns the resident bytes now, and resets the peak if the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peak so far is the base, slightly more than the memory now
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    """Returns the resident bytes at the peak."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    print(measure(spec["kind"], spec["device"], spec["sizes"]))
