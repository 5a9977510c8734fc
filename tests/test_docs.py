"""Every example runs when pasted into an empty interpreter."""

import doctest
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.test_public_api import DEFINITIONS, REPO

# The copies of the tests in which faults are planted have no README.
PAGES = [
    page for page in [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))] if page.exists()
]
SLOW = {"models.md"}  # trains fifteen models
RUN = [page for page in PAGES if page.name not in SLOW]
RUN += [pytest.param(page, marks=pytest.mark.full) for page in PAGES if page.name in SLOW]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]+)")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run(test):
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_docstring_examples(name):
    for test in doctest.DocTestFinder().find(DEFINITIONS[name], name, globs={}):
        run(test)


@pytest.mark.parametrize("page", RUN, ids=lambda p: str(p.relative_to(REPO)))
def test_page_examples(page: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    module = ModuleType("__main__")  # where `pickle` looks up the classes of a page
    monkeypatch.setitem(sys.modules, "__main__", module)
    text, names = page.read_text(), vars(module)  # all blocks share one namespace
    for block in FENCE.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if block[1].startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(block[1], names, page.name, str(page), line)
            run(test)
            names.update(test.globs)
        else:
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_within_the_repository_lead_somewhere(page: Path):
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not broken
