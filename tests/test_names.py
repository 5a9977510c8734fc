"""The table of names of 0.1: new names exist, old names are gone."""

import re
from pathlib import Path

import pytest

import vqprior

PAGE = Path(__file__).parents[1] / "docs" / "moving_over.md"
if not PAGE.exists():
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)
TABLE = PAGE.read_text().partition("## From 0.1 names")[2]
ROWS = [[re.findall(r"`([\w.]+)`", cell) for cell in row.split(" | ")[:2]]
        for row in TABLE.splitlines() if row.startswith("| `")]  # fmt: skip


def found(name):
    """Looks up a dotted name; instance attributes are looked up on an instance."""
    thing = vqprior
    for part in name.split("."):
        thing = getattr(thing, part, None)
        if thing is vqprior.EmbeddingCodebook:
            thing = vqprior.EmbeddingCodebook(2, 3)
    return thing


@pytest.mark.parametrize(("old", "new"), ROWS, ids=lambda names: "-".join(names))
def test_old_names_are_gone_and_new_ones_are_there(old, new):
    assert not [name for name in old if found(name) is not None]
    assert not [name for name in new if found(name) is None]


def test_the_table_is_as_long_as_ever():
    assert sum(len(old) for old, _ in ROWS) == 27
