"""Writes the index of the API reference: every public name with a link and its summary.

Run ``python -m tests.reference`` to update ``docs/api/reference.md``; a test compares the two.
"""

import inspect
import re
from pathlib import Path

import vqprior
from vqprior import _interfaces

API = Path(__file__).parent.parent / "docs" / "api"
INDEX = API / "reference.md"
CONFIGURATION = API.parent / "zensical.toml"
INTRODUCTION = """---
search:
  exclude: true  # each name is found on its own page
---

# Reference

All public names. What does not appear here is private and may change in any release.
"""


def pages() -> list[Path]:
    """Returns the pages of the reference in the order of the navigation, without the index."""
    names = re.findall(r'"api/(\w+\.md)"', CONFIGURATION.read_text())
    return [API / name for name in names if name != INDEX.name]


def documented(page: Path) -> list[str]:
    """Returns the names that a page documents."""
    return re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)


def summary(name: str) -> str:
    """Returns the first paragraph of the documentation of ``vqprior...name``."""
    thing = vqprior
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    text = inspect.getdoc(thing)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):  # a type, described below it
        pattern = rf'^{name.rpartition(".")[2]} = .*\n"""(.*?)"""'
        text = re.search(pattern, inspect.getsource(_interfaces), re.MULTILINE | re.DOTALL)[1]
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`")


def index() -> str:
    """Returns the text of the index."""
    sections = [INTRODUCTION]
    for page in pages():
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        lines = [
            f"- [`{name.rpartition('.')[2]}`]({page.name}#{name}): {summary(name)}"
            for name in documented(page)
        ]
        sections.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(sections)


if __name__ == "__main__":
    INDEX.write_text(index())
