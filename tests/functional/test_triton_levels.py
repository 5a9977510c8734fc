"""The kernels of `FSQ`, `LFQ` and `BSQ`: run by the interpreter, and compiled for GPUs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.functional.test_triton import HERE, needs_triton, run


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("place", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("name", "least"), [("levels", 100), ("bits", 30)])
def test_the_kernels_compute_what_plain_operators_do(place, name, least, tmp_path):
    options = ["-q", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", HERE / f"triton_{name}_cases.py", *options]
    output = run(*command, interpret=place == "interpreter", cache=tmp_path)
    # Only passed: nothing skipped, deselected or expected to fail.
    counts = re.search(r"^(\d+) passed in ", output, re.MULTILINE)
    assert counts is not None, output
    assert int(counts[1]) > least, output


@needs_triton
@pytest.mark.full
def test_registers_suffice(tmp_path):
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    if not all((tools / name).exists() for name in ("ptxas", "cuobjdump")):
        pytest.skip("this build of triton has no assembler for GPUs")
    command = ["-m", "tests.functional.triton_levels_compiled", 80, 90]
    output = run(*command, interpret=False, cache=tmp_path)
    rows = [json.loads(line) for line in output.splitlines()]
    bits = {"sign_bits", "bit_losses", "bits_gradient"}
    assert {row["function"] for row in rows} == {"round_to_levels", "levels_gradient"} | bits
    for row in rows:
        assert row["stack"] <= 64, row
        assert row["shared"] <= 16384, row
        assert not row["tensor_cores"], row
