"""The kernels of `FSQ`: run by the interpreter on the CPU, and compiled for GPUs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.functional.test_triton import HERE, needs_triton, run


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("place", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_kernels_compute_what_plain_operators_do(place, tmp_path):
    options = ["-q", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", HERE / "triton_levels_cases.py", *options]
    output = run(*command, interpret=place == "interpreter", cache=tmp_path)
    # Only passed: nothing skipped, deselected or expected to fail.
    counts = re.search(r"^(\d+) passed in ", output, re.MULTILINE)
    assert counts is not None, output
    assert int(counts[1]) > 100, output


@needs_triton
@pytest.mark.full
def test_registers_suffice(tmp_path):
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    if not all((tools / name).exists() for name in ("ptxas", "cuobjdump")):
        pytest.skip("this build of triton has no assembler for GPUs")
    command = ["-m", "tests.functional.triton_levels_compiled", 80, 90]
    output = run(*command, interpret=False, cache=tmp_path)
    rows = [json.loads(line) for line in output.splitlines()]
    assert {row["function"] for row in rows} == {"round_to_levels", "levels_gradient"}
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] <= 128, row
        assert row["shared"] <= 4096, row
