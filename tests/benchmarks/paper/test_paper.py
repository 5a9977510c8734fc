"""The benchmarks of the paper's model run, both sides compute the same; no time is asserted."""

import json
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.benchmarks import report
from tests.benchmarks.paper import measures
from tests.benchmarks.paper.__main__ import render
from tests.benchmarks.paper.release_form import in_release_form
from tests.benchmarks.timing import Settings
from tests.test_public_api import REPO

FOLDER = REPO / "docs" / "benchmarks"
QUICK = Settings(threads=1, repeats=3, seconds=0.1, quick=True)
pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="documentation and examples are not part of this copy"
)


@pytest.mark.full
# 32 x 32 is the size for which the release stores masks on the grid of codes, the other is not.
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_the_release_form_computes_the_same(size):
    model = measures.model_of(QUICK)
    # Position biases start near zero, where a wrong one would not show.
    for name, parameter in model.named_parameters():
        if name.endswith("relative_bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    lr = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(in_release_form(model)(lr), model(lr), rtol=0, atol=3e-4)


@pytest.mark.full
def test_the_work_of_both_forms():
    """In the authors' code 201,246,375,936 operations were counted on an image of 64 x 64."""
    full = Settings(threads=1)
    assert measures.operations(measures.release_of(full), full) == 201_246_375_936
    assert measures.operations(measures.model_of(full), full) <= 188e9


@pytest.mark.parametrize("name", ["paper", "paper-cuda"])
def test_the_page_shows_the_file(name):
    path = FOLDER / f"{name}.json"
    begin, end = report.markers(name)
    page = (FOLDER / "paper.md").read_text()
    assert page.count(begin) == page.count(end) == 1
    shown = page.partition(begin)[2].partition(end)[0].strip()
    expected = render(json.loads(path.read_text())) if path.exists() else "Not measured yet."
    assert shown == expected


@pytest.mark.full
def test_a_quick_run_measures_every_row_but_training(tmp_path):
    parts = [part for part in measures.PARTS_IN_ORDER if part not in ("training", "calls")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.paper", "--quick", "--threads", "1",
         "--only", *parts, "--output", str(tmp_path)],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "paper.json").read_text())["rows"]
    assert [row["part"] for row in rows] == [
        case.part for case in measures.CASES if case.part in parts
    ]
    assert all(row["value"] is not None for row in rows)


@pytest.mark.full
def test_wrong_part():
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.paper", "--only", "nonsense"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr
