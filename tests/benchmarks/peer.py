"""The package to compare with, imported on first use."""

import functools
import importlib
import importlib.metadata
from types import ModuleType

PEER = "vector-quantize-pytorch"
MISSING = (
    f'{PEER} is not installed, so comparisons with it are left out: pip install -e ".[test,peers]"'
)


@functools.cache
def load() -> ModuleType:
    """Imports and returns the package; raises ``ImportError`` if it is not installed."""
    return importlib.import_module("vector_quantize_pytorch")


def version() -> str | None:
    """Returns the installed version without importing the package; None if not installed."""
    try:
        return importlib.metadata.version(PEER)
    except importlib.metadata.PackageNotFoundError:
        return None
