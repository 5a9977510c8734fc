"""The benchmark of first lines trains, and its tables have what was trained."""

import pytest
import torch

from tests.benchmarks import first_lines
from tests.benchmarks.first_lines import LINES, PHOTOS, RECIPES, Job

if not PHOTOS.exists():
    pytest.skip("the examples are not part of this copy", allow_module_level=True)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["residual", "simvq-fast"])
def test_a_quantizer_is_trained_and_measured(name):
    run = first_lines.train(Job(name, 2e-3, 2, 0, PHOTOS))
    assert 5 < run["psnr"] < 20
    assert 0 < run["usage"] <= 1 <= run["perplexity"]
    assert run == first_lines.train(Job(name, 2e-3, 2, 0, PHOTOS))


@pytest.mark.parametrize("name", [*LINES, *RECIPES])
def test_quantizers_fit_the_autoencoder(name):
    make = LINES[name].ours if name in LINES else RECIPES[name][1]
    quantized, indices, loss = first_lines.Ours(make())(torch.randn(2, first_lines.DIM, 3, 3))
    assert quantized.shape == (2, first_lines.DIM, 3, 3)
    assert len(indices) == 18
    assert loss.isfinite()


def test_rows_hold_means_and_the_smallest_usage():
    def run(quantizer, psnr, usage):
        return {"quantizer": quantizer, "steps": 8, "rate": 0.1, "psnr": psnr, "usage": usage,
                "perplexity": 7.0}  # fmt: skip

    trained = [run("plain", 20.0, 0.9), run("plain", 21.0, 0.8), run("VectorQuantize", 20.0, 0.5)]
    what = LINES["plain"].what
    assert first_lines.rows(trained) == [
        [what, "8, 0.1", "20.50 dB, 80%", "20.00 dB, 50%", "+0.50 dB"]
    ]
    assert first_lines.recipes([run("bsq", 19.0, 0.25)]) == [
        ["BSQ, 12 bits", "19.00 dB", "25%", "7"]
    ]


def test_names_of_both_sides_differ():
    assert not {*LINES, *RECIPES} & set(first_lines.THEIRS)
    assert {line.theirs for line in LINES.values()} == set(first_lines.THEIRS)


def test_runs_of_other_quantizers_are_kept(tmp_path):
    path = tmp_path / "first_lines.json"
    assert first_lines.kept(path, ["plain"]) == []
    path.write_text('{"runs": [{"quantizer": "plain"}, {"quantizer": "bsq"}]}')
    assert first_lines.kept(path, ["plain"], []) == [{"quantizer": "bsq"}]
