"""The quantizer of docs/extending.md passes lint, types and doctests on its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
if not PAGE.exists():
    pytest.skip("the documentation is not part of this copy", allow_module_level=True)
CHECKS = {
    "lint": ["ruff", "check"],
    "types": ["mypy", "--strict", "--no-incremental"],
    "docstring": ["doctest"],
}
pytestmark = pytest.mark.full


@pytest.mark.parametrize("check", CHECKS)
def test_the_quantizer_of_the_page_is_clean(check, tmp_path):
    block = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    file = tmp_path / "sign.py"
    file.write_text(f'"""One bit for each feature."""\n\n{block}')
    command = [sys.executable, "-m", *CHECKS[check], str(file)]
    if check == "lint":
        command[4:4] = ["--config", str(ROOT / "pyproject.toml")]
    if check == "types":
        command[3:3] = ["--config-file", str(ROOT / "pyproject.toml")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
