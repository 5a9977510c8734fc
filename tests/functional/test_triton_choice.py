"""The kernels of `select_codes`: interpreted on the CPU, and compiled for GPUs not there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.functional.test_triton import needs_triton, run

HERE = Path(__file__).parent
KERNELS = {"_choose", "_lay_out", "_weigh", "_spread"}


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize(("cases", "number"), [("choice", 100), ("select", 15)])
@pytest.mark.parametrize("place", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_kernels_compute_what_is_defined(place, cases, number, tmp_path):
    file = HERE / f"triton_{cases}_cases.py"
    command = ["-m", "pytest", file, "-q", "-p", "no:cacheprovider"]
    output = run(*command, interpret=place == "interpreter", cache=tmp_path)
    # Only passed: nothing skipped, deselected or expected to fail.
    counts = re.search(r"^(\d+) passed in ", output, re.MULTILINE)
    assert counts is not None, output
    assert int(counts[1]) > number, output


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What each kernel uses on the GPUs of data centers, whose machine code differs most."""
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    if not all((tools / name).exists() for name in ("ptxas", "cuobjdump")):
        pytest.skip("this build of triton has no assembler for GPUs")
    script = ("-m", "tests.functional.triton_choice_compiled", 80, 90)
    output = run(*script, interpret=False, cache=tmp_path_factory.mktemp("cache"))
    rows = [json.loads(line) for line in output.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    return rows


@needs_triton
@pytest.mark.full
def test_two_programs_fit_into_the_shared_memory_of_data_centers(compiled):
    """A multiprocessor of capability 8.0 has 164 KiB, so two fit, one of 9.0 has 228: three."""
    assert all(row["shared"] <= 57 * 1024 for row in compiled), compiled


@needs_triton
@pytest.mark.full
def test_registers_suffice(compiled):
    """A plan that does not fit spills hundreds of bytes, as 4 warps for odd numbers of codes do."""
    assert all(row["stack"] <= 32 for row in compiled), compiled


@needs_triton
@pytest.mark.full
def test_tensor_cores_take_low_precision_alone(compiled):
    """They would round factors in float32, which the interpreter does not show."""
    of_products = [row for row in compiled if row["tensor_cores"]]
    assert of_products
    assert {row["dtype"] for row in of_products} == {"torch.float16"}
