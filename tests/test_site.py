"""The site: navigation, reference, pictures, and a build without a warning."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import reference
from tests.test_public_api import DEFINITIONS, PUBLIC, REPO, SPACES

if not reference.INDEX.exists():
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)
DOCS = REPO / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PICTURES = sorted((DOCS / "images").glob("*.svg"))
SITE = reference.CONFIGURATION.read_text()


def test_every_page_is_in_the_navigation():
    listed = re.findall(r'= "([\w/]+\.md)"', SITE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_reference_documents_exactly_the_public_names():
    names = [name for page in reference.pages() for name in reference.documented(page)]
    assert sorted(names) == sorted(PUBLIC.keys() - SPACES.keys())


def test_the_index_of_the_reference_is_up_to_date():
    message = "run `python -m tests.reference`"
    assert reference.INDEX.read_text() == reference.index(), message


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_links_to_the_reference_name_what_the_page_documents(page: Path):
    for path, name in re.findall(r"\]\(([\w./]*)#(vqprior[\w.]*)\)", page.read_text()):
        names = reference.documented(page.parent / path)
        known = next((key for key in names if f"{name}.".startswith(f"{key}.")), None)
        assert known, name
        if name != known:
            assert hasattr(DEFINITIONS[known], name[len(known) + 1 :]), name


def test_the_site_shows_the_version():
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    shown = re.findall(r"^(?:site_name|copyright) = \"vqprior (\d[^\",]*)", SITE, re.MULTILINE)
    assert shown == [version[1], version[1]]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.name)
def test_pictures_stand_alone_and_read_in_the_dark(picture: Path):
    text = picture.read_text()
    root = ElementTree.fromstring(text)
    assert root.find("{http://www.w3.org/2000/svg}title").text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|@import|@font-face", text)
    assert "prefers-color-scheme: dark" in text
    width = float(root.get("viewBox").split()[2])
    sizes = re.findall(r"font(?:-size)?: ([\d.]+)px", text)
    # A picture has 330 pixels on a phone.
    assert min(float(size) for size in sizes) * 330 / width >= 10


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("zensical")
    for name in ("docs", "vqprior"):
        ignored = shutil.ignore_patterns("site", ".cache", "__pycache__")
        shutil.copytree(REPO / name, tmp_path / name, ignore=ignored)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "docs")
    assert result.returncode == 0, result.stdout + result.stderr
