"""Architecture rules as tests: layers and their imports, file sizes, overriding, side effects."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import FunctionType

import pytest

import vqprior

ROOT = Path(vqprior.__file__).parent
# From the bottom up. A layer may import only itself and the names in its set; a new dependency is a
# decision to make here.
LAYERS = {
    "_distributed": set(),
    "_transforms": set(),
    "_checks": {"_transforms"},
    "_borrowed": {"_distributed"},
    "_precision": set(),
    "_placement": {"_precision", "_transforms"},
    "_results": set(),
    "_interfaces": {"_borrowed", "_checks", "_distributed", "_placement", "_precision", "_results"},
    "functional": {
        "_checks",
        "_distributed",
        "_precision",
        "_interfaces",
        "_results",
        "_transforms",
    },
    "nn": {"_checks", "_placement", "functional"},
    "codebooks": {
        "_borrowed",
        "_checks",
        "_distributed",
        "_precision",
        "_interfaces",
        "_results",
        "functional",
    },
    "_default_rules": {"_checks", "_interfaces", "codebooks"},
    "metrics": {"_checks", "_distributed", "_precision", "_interfaces", "functional"},
    "losses": {
        "_checks",
        "_distributed",
        "_placement",
        "_precision",
        "_interfaces",
        "_transforms",
        "functional",
        "nn",
        "metrics",
    },
    "predictors": {"_checks", "_interfaces", "functional", "nn"},
    # Wrappers and rules import only interfaces; a quantizer may import its default codebook.
    "quantizers": {
        "_checks",
        "_precision",
        "_interfaces",
        "_results",
        "_transforms",
        "functional",
        "codebooks._embedding",
        "codebooks._chained",
        "_default_rules",
    },
    "testing": {"_checks", "_interfaces", "_results"},
    # Readers of checkpoints return whole quantizers.
    "interop": {"_checks", "_interfaces", "functional", "nn", "codebooks", "quantizers"},
}
# Folders whose files import nothing from each other except from `_shared`.
INDEPENDENT = {"codebooks", "predictors", "quantizers"}
# Folders that are public namespaces; names in the others are public as ``vqprior.<Name>``.
NAMESPACES = {"functional", "interop", "losses", "metrics", "nn", "testing"}
EXTERNAL = {"torch", "einops", "numpy", "typing_extensions"}
# Optional packages, and the prefix of the modules that may import them.
OPTIONAL = {"triton": "_triton"}
MAX_LINES = 300

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))


def imports(path):
    """Absolute names imported anywhere in ``path``, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "vqprior":  # `from vqprior import x`: a module or a name
                yield from (f"vqprior.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_layers_form_a_tower():
    below = set()
    for layer, allowed in LAYERS.items():
        missing = {name.partition(".")[0] for name in allowed} - below
        assert not missing, f"{layer} is listed before {missing}"
        below.add(layer)


def test_every_folder_is_a_layer():
    found = {layer_of(path) for path in MODULES}
    assert found <= LAYERS.keys(), f"no rule for {found - LAYERS.keys()}"


@every_module
def test_module_imports_only_what_its_layer_allows(path):
    layer = layer_of(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top in OPTIONAL:
            assert path.name.startswith(OPTIONAL[top]), f"{name} is optional"
            continue
        if top != "vqprior":
            assert top in EXTERNAL or top in sys.stdlib_module_names, f"undeclared: {name}"
            continue
        target = rest.partition(".")[0]
        allowed = LAYERS[layer] | {layer}
        assert target in allowed or rest in allowed, f"{layer} may not import {name}"
        if target == layer in INDEPENDENT and not rest.startswith(f"{layer}._shared."):
            pytest.fail(f"{path.name} imports its sibling {name}")


@every_module
def test_only_one_door_to_torch_distributed(path):
    names = {name for name in imports(path) if name.startswith("torch.distributed")}
    nodes = ast.walk(ast.parse(path.read_text()))
    names |= {
        f"line {node.lineno}"
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and getattr(node.value, "id", "") == "torch"
    }
    assert not names or layer_of(path) == "_distributed", f"ask vqprior._distributed: {names}"


@every_module
def test_module_is_private_and_short(path):
    assert path.name.startswith("_"), "implementation modules start with _"
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines: split the file"


@pytest.mark.parametrize(
    "folder", sorted({str(p.parent.relative_to(ROOT)) for p in MODULES} - {"."})
)
def test_a_folder_is_a_namespace_or_a_shelf(folder):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    documentation, *rest = tree.body
    assert isinstance(documentation, ast.Expr)
    kinds = {type(node) for node in rest}
    if folder in NAMESPACES:
        assert kinds == {ast.ImportFrom, ast.Assign}, "imports and __all__, no logic"
    else:
        assert not kinds, "this folder exports nothing: its names are public as vqprior.<Name>"


def says_one_thing(function):
    """Whether the body only raises or returns a constant, as a default does."""
    source = textwrap.dedent(inspect.getsource(getattr(function, "fget", function)))
    _, *body = ast.parse(source).body[0].body  # the docstring comes first
    return all(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Return) and isinstance(node.value, ast.Constant))
        for node in body
    )


def test_nothing_overrides_a_method_that_does_something():
    """Except in wrappers, which forward every call and override what they change."""
    modules = [
        importlib.import_module(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
        for path in MODULES
        if "_triton_" not in path.name
    ]
    classes = {
        thing
        for module in modules
        for thing in vars(module).values()
        if inspect.isclass(thing) and thing.__module__ == module.__name__
    }
    for cls in classes:
        for base in cls.__mro__[1:]:
            if not base.__module__.startswith("vqprior") or base is vqprior.QuantizerWrapper:
                continue
            for name in vars(cls).keys() & vars(base).keys():
                theirs = vars(base)[name]
                if name.startswith("__") or not isinstance(theirs, (FunctionType, property)):
                    continue
                abstract = getattr(theirs, "__isabstractmethod__", False)
                assert abstract or says_one_thing(theirs), f"{cls.__name__}.{name}"


@every_module
def test_the_library_does_not_know_its_applications(path):
    """Except for References, the library does not name a task."""
    text = re.sub(r"References:\n.*?(?=\n {4}\w+:|\"{3})", "", path.read_text(), flags=re.DOTALL)
    found = re.findall(r"(?i).*super.?resol.*|.*\btvq.?(?:&|and).?rap\b.*", text)
    assert not found, f"name what it does, not who uses it: {found}"


@pytest.mark.full
def test_import_has_no_side_effects():
    """Importing changes no environment variable, logger, warning filter, default or RNG.

    It imports no optional package, and no module that needs one.
    """
    code = """
import logging, os, random, sys, warnings
import numpy, torch
def state():
    return (dict(os.environ), logging.root.handlers[:], warnings.filters[:], random.getstate(),
            torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(),
            torch.get_rng_state().tolist(), numpy.random.get_state()[2], torch.is_grad_enabled(),
            torch.cuda.is_initialized(), torch.get_float32_matmul_precision())
before, imported = state(), set(sys.modules)
import vqprior
assert state() == before
optional = ("triton", "vqprior.functional._triton_")  # the second is what imports the first
assert not [name for name in set(sys.modules) - imported if name.startswith(optional)]
"""
    # A minimal environment: this process has imported vqprior already.
    inherited = {k: os.environ[k] for k in ("PATH", "PYTHONPATH", "SYSTEMROOT") if k in os.environ}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent, env=inherited)
