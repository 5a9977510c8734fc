"""Steps launch no more than they may; numbers of operators, not times."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.benchmarks.launches import STEPS, count
from tests.test_public_api import REPO


@pytest.mark.parametrize("name", STEPS)
def test_operators_on_a_cpu(name):
    _, most, _ = STEPS[name]
    names = count(name)
    assert names.total() <= most, names.most_common()


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_operators_and_kernels_on_a_gpu():
    """In a process of its own: whether kernels are interpreted is decided as they are defined."""
    command = [sys.executable, "-m", "tests.benchmarks.launches", "--gpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=REPO, env=environment
    )
    assert result.returncode == 0, result.stderr
    rows = [line.rsplit(maxsplit=5) for line in result.stdout.splitlines()]
    assert [row[0].strip() for row in rows] == list(STEPS)
    assert all(int(row[1]) <= int(row[-1]) for row in rows), result.stdout
