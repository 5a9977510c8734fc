"""Large photos: what is refused before the work, and the memory that the others need."""

import re
import subprocess
import sys

import pytest
from PIL import Image

import upscale
from tests.examples.little_train import ENVIRONMENT
from tests.examples.stand_in import StandIn
from tvqrap.cli import UserError, run
from upscale import check_input_size

# Upscales a photo with a model that needs no memory of its own; prints the peak.
PEAK = """
import resource, sys
from pathlib import Path
from torch import nn
from torch.nn import functional as F
from tvqrap.images.jobs import Job
from tvqrap.images.layouts import Blended, Tiling
from upscale import upscale_file

class Nearest(nn.Module):
    tiling = Tiling(multiple=2, overlap=4)

    def forward(self, lr):
        return F.interpolate(lr, scale_factor=4)

source, *results = map(Path, sys.argv[1:])
upscale_file(Nearest(), Job(source, *results), Blended(64))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
UNIT = 1 if sys.platform == "darwin" else 1024  # of that number, in bytes


def peak(*files):
    """Bytes that a process needs at most to upscale the first file."""
    command = [sys.executable, "-c", PEAK, *map(str, files)]
    output = subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    return UNIT * int(re.search(r"peak (\d+)", output.stdout)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="resource is of Unix")
@pytest.mark.parametrize(("mode", "suffix", "needed"), [("RGB", "png", 6), ("RGBA", "jpg", 20)])
def test_memory_is_what_the_help_says(mode, suffix, needed, tmp_path):
    sides = (16, 2000)
    for side in sides:
        Image.new(mode, (side, side)).save(tmp_path / f"{side}.png")
    small, large = (
        peak(*(tmp_path / name for name in (f"{n}.png", f"{n}_4x.{suffix}", f"{n}_beside.png")))
        for n in sides
    )
    assert large - small < needed * (4 * 2000) ** 2


def test_sizes():
    check_input_size(8, 8)
    check_input_size(8000, 6000)  # 48 megapixels, as phones make
    with pytest.raises(UserError, match=r"is 8x7; the smallest size is 8x8"):
        check_input_size(8, 7)
    message = r"is 2501x1250, so the result would have 50\.0 megapixels; the limit is 50\. "
    with pytest.raises(UserError, match=message):
        check_input_size(2501, 1250, limit=50)
    check_input_size(2500, 1250, limit=50)


def test_the_limit_is_an_option(tmp_path, monkeypatch, capsys):
    model = StandIn().eval()
    monkeypatch.setattr(upscale, "load_super_resolver", lambda path: model)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 300)).save("a.png")
    arguments = ["a.png", "--output", "out"]
    assert run(lambda: upscale.main([*arguments, "--limit", "1"])) == 1
    assert "would have 1.4 megapixels; the limit is 1." in capsys.readouterr().err
    assert model.calls == []
    assert run(lambda: upscale.main([*arguments, "--limit", "2"])) == 0


def test_too_large_for_the_format_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    model = StandIn().eval()
    monkeypatch.setattr(upscale, "load_super_resolver", lambda path: model)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4100, 8)).save("a.png")
    assert run(lambda: upscale.main(["a.png", "--output", "out", "--format", "webp"])) == 1
    assert "at most 16383 pixels a side, this one is 16400x32" in capsys.readouterr().err
    assert model.calls == []
