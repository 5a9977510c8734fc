"""The page that maps its options to ours leaves none out."""

import inspect
import re
from pathlib import Path

import pytest

import vqprior

peer = pytest.importorskip(
    "vector_quantize_pytorch", reason="the extra `peers` is not installed: nothing to compare with"
)
PAGE = Path(__file__).parents[2] / "docs" / "moving_over.md"
if not PAGE.exists():
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)
SECTIONS = dict(
    part.partition("\n")[::2] for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
)
CLASSES = [
    "VectorQuantize",
    "ResidualVQ",
    "GroupedResidualVQ",
    "SimVQ",
    "FSQ",
    "LFQ",
    "ResidualFSQ",
    "RandomProjectionQuantizer",
    "HierarchicalVQ",
    "LatentQuantize",
    "FSP",
]


SHARED = "Options of several classes"


def options_in(section):
    """What stands in the first column of the first table of a section."""
    table = SECTIONS[section].partition("| option | here |")[2].partition("\n\n")[0]
    rows = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| `")]
    return [option for row in rows for option in re.findall(r"`(\w+)`", row)]


def options_of(name):
    return set(inspect.signature(getattr(peer, name)).parameters)


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_is_on_the_page_once(name):
    """A row of its own table counts before a shared one."""
    own, options = options_in(name), options_of(name)
    assert len(own) == len(set(own))
    assert set(own) | (set(options_in(SHARED)) & options) == options


def test_every_shared_option_belongs_to_a_class():
    shared = options_in(SHARED)
    assert len(shared) == len(set(shared))
    assert set(shared) <= set().union(*map(options_of, CLASSES))


def test_there_are_as_many_options_as_ever():
    assert len(inspect.signature(peer.VectorQuantize).parameters) == 44


def test_every_class_is_mentioned():
    text = PAGE.read_text()
    names = {name for name in vars(peer) if name[0].isupper()} - {"Sequential"}
    assert not {name for name in names if f"`{name}`" not in text and name not in SECTIONS}


def test_names_of_ours_exist():
    spaces = [vqprior, vqprior.functional, vqprior.interop, vqprior.nn]
    text = PAGE.read_text().partition("## From 0.1 names")[0]  # which tests/test_names.py reads
    for path in re.findall(r"(?:functional|interop|nn)\.(?!md\b)(\w+)", text):
        known = [space for space in spaces if hasattr(space, path)]
        assert known or hasattr(__import__("torch").nn, path), path
