"""The page of claims and the tests of claims name each other."""

import ast
import re
from pathlib import Path

from tests.test_public_api import REPO

FOLDER = Path(__file__).parent
TESTS = [
    node
    for file in sorted(FOLDER.glob("test_*.py"))
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_claim_")
]


def rows():
    """The claims of the page: the number, and the tests that it names."""
    page = (REPO / "docs" / "claims.md").read_text()
    for line in re.findall(r"^\| \d+ \|.*$", page, re.MULTILINE):
        number, _, tests, _ = (cell.strip() for cell in line.strip("|").split("|"))
        yield int(number), re.findall(r"`(test_claim_\w+)`", tests)


def test_the_page_lists_all_claims_in_order():
    assert [number for number, _ in rows()] == list(range(1, 26))


def test_the_page_names_every_test_once_beside_its_claim():
    named = [test for _, tests in rows() for test in tests]
    assert sorted(named) == sorted(node.name for node in TESTS)
    for number, tests in rows():
        assert tests
        assert all(test.startswith(f"test_claim_{number:02}_") for test in tests)


def test_every_test_says_what_goes_wrong_elsewhere():
    for node in TESTS:
        assert (ast.get_docstring(node) or "").startswith("vector-quantize-pytorch "), node.name
