"""Each published model takes a few lines of public names.

``test_docs.py`` executes the page, which asserts that losses fall and codes are in use.
"""

import ast
import itertools
import re

import pytest

from tests.test_docs import FENCE
from tests.test_public_api import PUBLIC, REPO, SPACES

MAX_LINES = 15
MODELS = [
    "VQ-VAE",
    "VQ-VAE-2",
    "VQGAN",
    "RQ-VAE",
    "EnCodec",
    "DAC",
    "VAR",
    "MAGVIT-v2",
    "BSQ",
    "FSQ",
    "SimVQ",
    "IBQ",
    "CodeFormer",
    "FeMaSR",
    "TVQ&RAP",
]
PAGE = (REPO / "docs" / "models.md").read_text()
SECTIONS = {
    section.partition("\n")[0]: section for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)
}
every_model = pytest.mark.parametrize("model", MODELS)


def blocks(model):
    """Returns the blocks that build the model and those that train and check it."""
    found = [block[1] for block in FENCE.finditer(SECTIONS[model])]
    trains = [re.search(r"(?<!\.)\btrain\(", code) is not None for code in found]
    checks = list(itertools.compress(found, trains))
    return [code for code in found if code not in checks], checks


def code_lines(block):
    """The lines of a block without comments and imports."""
    block = re.sub(r"^(from|import) [^(\n]*(\([^)]*\))?\n", "", block, flags=re.MULTILINE)
    lines = (line.strip() for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def dotted(node):
    """``a.b.c`` of an attribute chain that starts at a name, or None."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


def violations(block):
    """Names in ``block`` that are neither public names of the library nor plain torch."""
    known = PUBLIC.keys() | SPACES.keys()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] != "torch")
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vqprior":
            names = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name for name in names if name not in known)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] != "torch":
            yield node.module
        elif isinstance(node, ast.Attribute):
            path = dotted(node) or ""
            if node.attr.startswith("_") or (path.startswith("vqprior.") and path not in known):
                yield path or node.attr


def test_the_page_is_set_up_and_then_the_models():
    assert list(SECTIONS)[1:] == ["Set-up", *MODELS]


@every_model
def test_one_assembly_of_few_lines(model):
    assemblies, checks = blocks(model)
    assert len(assemblies) == len(checks) == 1
    assert len(code_lines(assemblies[0])) <= MAX_LINES


@every_model
def test_public_names_and_plain_torch_alone(model):
    assemblies, checks = blocks(model)
    assert list(violations(assemblies[0])) == list(violations(checks[0])) == []


@every_model
def test_losses_and_usage_are_asserted_and_the_paper_is_linked(model):
    checked = ast.parse(blocks(model)[1][0])
    asserted = {
        name.id
        for statement in ast.walk(checked)
        if isinstance(statement, ast.Assert)
        for name in ast.walk(statement.test)
        if isinstance(name, ast.Name)
    }
    assert asserted >= {"first", "last", "usage"}
    assert re.search(r"\[Paper\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", SECTIONS[model])
    assert "Weights" in SECTIONS[model]


@every_model
def test_the_list_links_to_the_section(model):
    anchor = re.sub(r"[^\w-]", "", model.lower())
    assert f"[{model}](#{anchor})" in SECTIONS[next(iter(SECTIONS))]
