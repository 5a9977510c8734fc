"""The public API: each name has one path, is documented, and is listed in ``tests/api.txt``."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from importlib.metadata import requires
from importlib.resources import files
from pathlib import Path

import pytest

import vqprior

REPO = Path(__file__).parent.parent
NAMESPACES = ("functional", "interop", "losses", "metrics", "nn", "testing")
SPACES = {
    "vqprior": vqprior,
    **{f"vqprior.{name}": getattr(vqprior, name) for name in NAMESPACES},
}
PUBLIC = {
    f"{path}.{name}": getattr(space, name)
    for path, space in SPACES.items()
    for name in space.__all__
}
DEFINITIONS = {k: v for k, v in PUBLIC.items() if inspect.isclass(v) or inspect.isfunction(v)}
CONCRETE = {
    name: thing
    for name, thing in DEFINITIONS.items()
    if not inspect.isabstract(thing) and not getattr(thing, "_is_protocol", False)
}
MADE_TO_DERIVE_FROM = {"vqprior.QuantizerWrapper"}
INTERFACES = (vqprior.QuantizerBase, vqprior.Codebook, vqprior.UpdateRule)
every_definition = pytest.mark.parametrize("name", DEFINITIONS)
every_concrete = pytest.mark.parametrize("name", CONCRETE)


def raises(function):
    """Whether the body contains ``raise`` or calls one of the ``check_*`` helpers."""
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    return any(isinstance(node, ast.Raise) for node in nodes) or any(
        getattr(call, "id", "").startswith("check_") for call in calls
    )


def test_surface_is_the_recorded_one():
    """Adding, removing or renaming a name must show up as a diff of ``tests/api.txt``."""
    assert sorted(PUBLIC) == (REPO / "tests" / "api.txt").read_text().split()


def test_the_package_is_typed_and_needs_little():
    assert (files("vqprior") / "py.typed").is_file()
    names = [name for name in requires("vqprior") if "extra" not in name]
    needed = {re.split(r"[^\w-]", name)[0] for name in names}
    assert needed == {"torch", "einops", "numpy", "typing-extensions"}


def test_every_object_has_one_public_path():
    assert len({id(value) for value in PUBLIC.values()}) == len(PUBLIC)


def test_every_namespace_is_an_attribute_of_the_package():
    folders = {path.parent.name for path in Path(vqprior.__file__).parent.glob("*/__init__.py")}
    namespaces = {
        name for name in folders if hasattr(importlib.import_module(f"vqprior.{name}"), "__all__")
    }
    assert {path.partition(".")[2] for path in SPACES} - {""} == namespaces


def test_lists_are_sorted_and_complete():
    for path, space in SPACES.items():
        # Sorted as by `ruff`, capitals first, and complete.
        assert len(space.__all__) == len(set(space.__all__)), path
        for name, value in vars(space).items():
            defined = inspect.isclass(value) or inspect.isfunction(value)
            if defined and not name.startswith("_") and value.__module__.startswith("vqprior"):
                assert name in space.__all__, f"{path}.{name}"


@every_concrete
def test_docstring_has_every_section(name):
    thing, text = DEFINITIONS[name], inspect.getdoc(DEFINITIONS[name]) or ""
    if dataclasses.is_dataclass(thing):
        assert not [f.name for f in dataclasses.fields(thing) if f"{f.name}: " not in text]
        return
    parameters = inspect.signature(thing).parameters
    required = {"Shape:", "Examples:"} | ({"Args:"} if parameters else set())
    if inspect.isfunction(thing):
        required.add("Returns:")
    if raises(thing if inspect.isfunction(thing) else thing.__init__):
        required.add("Raises:")
    assert not {section for section in required if section not in text}
    described = text.partition("Args:")[2]
    assert not [parameter for parameter in parameters if f"{parameter}: " not in described]


@every_definition
def test_docstring_begins_with_one_sentence(name):
    summary = (inspect.getdoc(DEFINITIONS[name]) or "").partition("\n\n")[0]
    assert summary
    assert summary.rstrip()[-1] in ".;:`" or summary.endswith(")"), summary


@every_concrete
def test_methods_that_raise_say_so(name):
    thing = DEFINITIONS[name]
    if inspect.isfunction(thing):
        return
    for method_name, method in vars(thing).items():
        if inspect.isfunction(method) and not method_name.startswith("_") and raises(method):
            text = f"{inspect.getdoc(method)} {inspect.getdoc(thing)}"
            assert "Raises:" in text, f"{name}.{method_name}"


@every_concrete
def test_signatures_stay_small(name):
    """Eight arguments are the limit, reached by ``VectorQuantizer``."""
    parameters = inspect.signature(DEFINITIONS[name]).parameters.values()
    assert len(parameters) <= 8
    assert not [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    switches = [p.name for p in parameters if isinstance(p.default, bool)]
    assert len(switches) <= 1, f"{switches}: replace two switches by an object"
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert not [p.name for p in positional if isinstance(p.default, bool)], "name your switches"


@every_concrete
def test_concrete_modules_are_final(name):
    """Users wrap them instead of deriving from them."""
    thing = DEFINITIONS[name]
    if inspect.isclass(thing) and issubclass(thing, INTERFACES) and name not in MADE_TO_DERIVE_FROM:
        assert getattr(thing, "__final__", False)
