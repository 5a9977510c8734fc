"""The Triton kernels: run by the interpreter on the CPU, and compiled for GPUs that are not there.

What they compute is in `triton_cases.py`; on a machine with a GPU, the same cases run on it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo  # before a test replaces `find_spec`, which its import calls
from torch._subclasses import FakeTensorMode

from vqprior.functional._kernels import _triton

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(*arguments, interpret, cache):
    """What Python prints in a process of its own, where warnings are errors too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nor do others' plugins warn there
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("place", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("file", "least"), [("triton_cases.py", 100), ("triton_rules.py", 20)])
def test_the_kernels_compute_what_is_defined(place, file, least, tmp_path):
    pytest_options = ["-q", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", HERE / file, *pytest_options]
    output = run(*command, interpret=place == "interpreter", cache=tmp_path)
    # Only passed: nothing skipped, deselected or expected to fail.
    counts = re.search(r"^(\d+) passed in ", output, re.MULTILINE)
    assert counts is not None, output
    assert int(counts[1]) > least, output


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What each kernel uses on the GPUs of data centers, whose machine code differs most."""
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    if not all((tools / name).exists() for name in ("ptxas", "cuobjdump")):
        pytest.skip("this build of triton has no assembler for GPUs")
    cache = tmp_path_factory.mktemp("cache")
    output = run("-m", "tests.functional.triton_compiled", 80, 90, interpret=False, cache=cache)
    rows = [json.loads(line) for line in output.splitlines()]
    functions = {"nearest", "add_statistics_", "move_averages", "revive"}
    assert {row["function"] for row in rows} == functions
    return rows


@needs_triton
@pytest.mark.full
def test_two_programs_fit_into_the_smallest_shared_memory(compiled):
    """A multiprocessor of capability 8.6 or 8.9 has 100 KiB, of which each program loses 1."""
    assert all(row["shared"] <= 49 * 1024 for row in compiled), compiled


@needs_triton
@pytest.mark.full
def test_registers_suffice(compiled):
    """Many features spill a little around the inner loop, how much differs from version to version:
    a plan that does not fit spills thousands of bytes."""
    for row in compiled:
        few = row["size"][2] <= 64
        assert row["stack"] <= (16 if few else 512), row


@needs_triton
@pytest.mark.full
def test_products_are_left_to_float32_arithmetic(compiled):
    """Tensor cores would round the factors, which the interpreter does not show."""
    assert not any(row["tensor_cores"] for row in compiled), compiled


@pytest.fixture
def pretended(monkeypatch):
    """A machine on which the kernels can run, to be broken in one respect."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(_triton, "_can_build_launchers", lambda: True)
    _triton._can_run_on.cache_clear()
    yield monkeypatch
    _triton._can_run_on.cache_clear()


def tensors_on(device, *dtypes):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [torch.empty(3, device=device, dtype=dtype) for dtype in dtypes]


@pytest.mark.parametrize(
    ("dtypes", "usable"),
    [
        ([torch.float32, torch.float16, torch.bfloat16, torch.int64], True),
        ([torch.float32, torch.float64], False),
        ([torch.complex64], False),
        ([], False),
    ],
    ids=str,
)
def test_kernels_take_dtypes_up_to_float32(pretended, dtypes, usable):
    assert _triton.is_usable(*tensors_on("cuda:0", *dtypes)) == usable


@pytest.mark.parametrize("others", ["cuda:1", "cpu", "meta"])
def test_kernels_take_tensors_of_one_device(pretended, others):
    tensors = tensors_on("cuda:0", torch.float32) + tensors_on(others, torch.float32)
    assert not _triton.is_usable(*tensors)
    assert not _triton.is_usable(*tensors_on("cpu", torch.float32))


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.version, "hip", "6.2"),
        (torch.cuda, "is_available", lambda: False),
        (torch.cuda, "get_device_capability", lambda device: (7, 5)),
        (importlib.util, "find_spec", lambda name: None),
        (_triton, "_can_build_launchers", lambda: False),
    ],
    ids=["amd", "no device", "old device", "no triton", "no compiler"],
)
def test_kernels_are_left_out_where_they_cannot_run(pretended, owner, name, value):
    pretended.setattr(owner, name, value)
    assert not _triton.is_usable(*tensors_on("cuda:0", torch.float32))


def test_launchers_need_a_compiler_and_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(_triton.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setenv("CC", "gcc")
    assert not _triton._can_build_launchers()
    (tmp_path / "Python.h").touch()
    assert _triton._can_build_launchers()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not _triton._can_build_launchers()
