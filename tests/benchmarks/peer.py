"""The package that is compared with, imported when it is first needed."""

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
    """The package; ``ImportError`` if it is not there."""
    return importlib.import_module("vector_quantize_pytorch")


def version() -> str | None:
    """Which version there is, without importing it."""
    try:
        return importlib.metadata.version(PEER)
    except importlib.metadata.PackageNotFoundError:
        return None
