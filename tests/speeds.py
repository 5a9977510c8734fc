"""Which tests are marked `full`: `pytest` skips them, `pytest -m full` runs only them."""

import pytest

# Tests here are `full`, except files that take less than a second; so are tests that compile.
FULL = (
    "distributed",
    "peers",
    "examples",
    "test_faults.py",
    "contracts/test_compile.py",
    "contracts/test_cross_product.py",
)
QUICK = tuple(f"examples/test_{name}.py" for name in ("jpeg", "images", "inputs", "jobs"))
COMPILING = ("compiles", "one_graph", "export")


def full(*values):
    """Marks values of a parameter as `full`."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def is_full(path, name):
    """Whether a test is `full` by its path, relative to ``tests``, or its name."""
    lies = any(path == place or path.startswith(f"{place}/") for place in FULL)
    return (lies and path not in QUICK) or any(word in name for word in COMPILING)
