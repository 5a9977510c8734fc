"""The two speeds: `pytest` leaves out what is marked `full`, `pytest -m full` runs just that."""

import pytest

# What lies here is `full`, but for files that take less than a second; so is what compiles.
FULL = (
    "distributed",
    "peers",
    "examples",
    "test_faults.py",
    "contracts/test_compile.py",
    "contracts/test_cross_product.py",
)
QUICK = ("examples/test_jpeg.py", "examples/test_images.py")
COMPILING = ("compiles", "one_graph", "export")


def full(*values):
    """Values of a parameter that the quick run leaves out."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def is_full(path, name):
    """Whether a test is `full` for its file, relative to ``tests``, or for its name."""
    lies = any(path == place or path.startswith(f"{place}/") for place in FULL)
    return (lies and path not in QUICK) or any(word in name for word in COMPILING)
