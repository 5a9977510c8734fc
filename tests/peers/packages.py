"""Modules of installed packages, without what their ``__init__`` would import."""

import importlib
import sys
import warnings
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType

import pytest


def load(name, version, module, stubs=None):
    """Imports one module of a distribution; skips where this version of it is not installed.

    The packages above the module are empty, so that their ``__init__`` does not run. ``stubs``
    are modules that it imports without need, and their attributes: ``{"a.b": {"c": None}}``. What
    was imported is not left in ``sys.modules``.
    """
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        found = None
    if found is None or found.version != version:
        got = "is not installed" if found is None else f"is {found.version}, not {version}"
        pytest.skip(f"{name} {got}: pip install --no-deps {name}=={version}")
    stubs = stubs or {}
    tops = {path.partition(".")[0] for path in (module, *stubs)}
    with _unloaded(tops), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the torch of its day, `torch.jit` for one
        for path in (*_above(module), *(part for stub in stubs for part in (*_above(stub), stub))):
            package = ModuleType(path)
            package.__path__ = [str(found.locate_file(path.replace(".", "/")))]
            sys.modules[path] = package
        for path, attributes in stubs.items():
            vars(sys.modules[path]).update(attributes)
        return importlib.import_module(module)


def _above(path):
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


@contextmanager
def _unloaded(tops):
    """Without these packages, whatever was imported of them before or is imported inside."""

    def take():
        names = [name for name in sys.modules if name.partition(".")[0] in tops]
        return {name: sys.modules.pop(name) for name in names}

    before = take()
    try:
        yield
    finally:
        take()
        sys.modules.update(before)
