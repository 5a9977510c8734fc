"""upscale.py as its user meets it: what is written, what is refused, and what is said."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import upscale
from tests.examples.stand_in import StandIn
from tvqrap.cli import UsageError, run
from tvqrap.images.files import read_image

CHANNELS_LAST = torch.channels_last


@pytest.fixture
def model(monkeypatch):
    model = StandIn().eval()
    monkeypatch.setattr(upscale, "load_super_resolver", lambda path: model)
    return model


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name, size=(16, 12), mode="RGB", **options):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    image.save(name, **options)
    return image


def upscale_py(*arguments):
    return run(lambda: upscale.main([*arguments, "--output", "out"]))


def written():
    return sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*"))


@pytest.mark.usefixtures("model")
class TestTheScript:
    def test_results_have_the_sources_names_and_four_times_the_size(self, here, capsys):
        save("a.png")
        save("in/b.jpg", (9, 17))
        save("in/c.webp")
        assert upscale_py("a.png", "in", "--compare") == 0
        assert written() == [
            "a.png", "a_comparison.png", "b.png", "b_comparison.png", "c.png", "c_comparison.png",
        ]  # fmt: skip
        with Image.open("out/b.png") as image:
            assert image.size == (36, 68)
        out, err = capsys.readouterr()
        assert out.splitlines()[0] == "a.png -> out/a.png (64x48)"
        assert out.splitlines()[-1] == "3 of 3 images upscaled, in out"
        assert err == ""

    def test_the_pixels_are_the_models(self, here, model):
        save("a.png")
        upscale_py("a.png", "--tile", "32")
        with torch.no_grad():
            expected = model(read_image(Path("a.png")).rgb[None])[0].clamp(0, 1)
        got = read_image(Path("out/a.png")).rgb
        torch.testing.assert_close(got, expected, rtol=0, atol=0.51 / 255)

    def test_the_share_of_the_texture_is_the_models_or_what_is_asked_for(self, here, model, capsys):
        save("a.png")
        model.texture_strength = 0.5
        upscale_py("a.png")
        assert model.texture_strength == 0.5
        upscale_py("a.png", "--overwrite", "--texture", "0")
        assert model.texture_strength == 0
        for wrong in ("1.5", "much", "nan"):
            with pytest.raises(SystemExit):
                upscale_py("a.png", "--texture", wrong)
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.endswith(f"--texture: must be a number from 0 to 1, got {wrong}")

    @pytest.mark.parametrize(
        ("suffix", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")]
    )
    def test_formats(self, here, suffix, kind):
        save("a.png", mode="RGBA")
        assert upscale_py("a.png", "--format", suffix) == 0
        with Image.open(f"out/a.{suffix}") as image:
            assert image.format == kind

    def test_kinds_of_images(self, here):
        for mode in ("1", "L", "LA", "RGB", "RGBA", "I;16"):
            name = f"in/{mode.replace(';', '')}.png"
            if mode == "I;16":
                Path("in").mkdir(exist_ok=True)
                Image.fromarray(np.full((9, 9), 1000, np.uint16)).save(name)
            else:
                save(name, mode=mode)
        assert upscale_py("in") == 0
        modes = {}
        for path in Path("out").iterdir():
            with Image.open(path) as image:
                modes[path.stem] = image.mode
        assert modes == {
            "1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "I16": "I;16",
        }  # fmt: skip

    def test_transparency_lost_in_jpeg_is_said(self, here, capsys):
        save("a.png", mode="RGBA")
        save("b.png", mode="RGB")
        image = save("c.png", mode="RGB")
        image.putalpha(Image.new("L", image.size, 7))
        image.save("c.png")
        assert upscale_py("a.png", "b.png", "c.png", "--format", "jpg") == 0
        assert (
            capsys.readouterr().err == "note: c.png: JPEG has no transparency; blended onto white\n"
        )

    def test_failures_are_one_line_each_and_the_rest_goes_on(self, here, capsys):
        save("good.png")
        Path("text.png").write_text("hello")
        Path("empty.png").write_bytes(b"")
        Path("cut.png").write_bytes(Path("good.png").read_bytes()[:300])
        save("small.png", (7, 30))
        save("zero_by_n.png", (1, 30))
        names = ["text.png", "empty.png", "cut.png", "small.png", "zero_by_n.png", "none.png"]
        assert upscale_py(*names, "good.png") == 1
        out, err = capsys.readouterr()
        assert [line.split(":")[:2] for line in err.splitlines()] == [
            ["error", f" {name}"] for name in names
        ]
        assert "small.png: is 7x30; the smallest size is 8x8" in err
        assert written() == ["good.png"]
        assert out.splitlines()[-1] == "1 of 7 images upscaled, in out"

    def test_eight_by_eight_is_enough(self, here):
        save("a.png", (8, 8))
        assert upscale_py("a.png", "--compare") == 0

    def test_nothing_is_replaced_unasked(self, here, capsys):
        save("a.png")
        save("b.png")
        assert upscale_py("a.png") == 0
        before = Path("out/a.png").stat()
        save("a.png", mode="L")
        assert upscale_py("a.png", "b.png") == 1
        assert "error: a.png: out/a.png exists already; pass --overwrite to replace it" in (
            capsys.readouterr().err.splitlines()
        )
        assert Path("out/a.png").stat() == before
        assert written() == ["a.png", "b.png"]
        assert upscale_py("a.png", "b.png", "--overwrite") == 0
        with Image.open("out/a.png") as image:
            assert image.mode == "L"

    def test_an_existing_comparison_counts_too(self, here, model):
        save("a.png")
        save("out/a_comparison.png")
        assert upscale_py("a.png", "--compare") == 1
        assert model.calls == []
        assert written() == ["a_comparison.png"]

    @pytest.mark.parametrize("how", ["itself", "symlink", "hardlink"])
    def test_inputs_are_never_replaced(self, here, how, capsys):
        save("out/a.png")
        before = Path("out/a.png").read_bytes()
        arguments = ["out/a.png"]
        if how != "itself":
            Path("in").mkdir()
            Path("out/a.png").rename("in/a.png")
            link = Path("out/a.png")
            link.symlink_to("../in/a.png") if how == "symlink" else link.hardlink_to("in/a.png")
            arguments = ["in/a.png"]
        assert upscale_py(*arguments, "--overwrite") == 1
        assert "out/a.png would be overwritten, but is an input" in capsys.readouterr().err
        assert Path("out/a.png").read_bytes() == before

    def test_an_interrupt_leaves_what_is_finished_and_nothing_else(self, here, model, capsys):
        for name in "ab":
            save(f"{name}.png")

        def forward(lr):
            if model.calls:
                raise KeyboardInterrupt
            return StandIn.forward(model, lr)

        model.forward = forward
        assert upscale_py("a.png", "b.png") == 130
        assert written() == ["a.png"]
        assert capsys.readouterr().err == "\ninterrupted\n"

    def test_a_full_disk_is_found_before_the_work(self, here, model, monkeypatch, capsys):
        save("a.png")
        usage = type("usage", (), {"total": 10**9, "free": 5000})
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
        assert upscale_py("a.png") == 1
        assert "a.png: out: only 0.0 MB are free on this disk" in capsys.readouterr().err
        assert (model.calls, written()) == ([], [])

    def test_a_folder_that_cannot_be_made_is_found_before_the_work(self, here, model, capsys):
        save("a.png")
        Path("out").write_bytes(b"")
        assert upscale_py("a.png") == 1
        assert capsys.readouterr().err == (
            "error: out: cannot write to this folder: it is not a folder\n"
        )
        assert model.calls == []

    def test_nothing_to_do(self, here, capsys):
        assert upscale_py("*.png") == 1
        assert capsys.readouterr().err == "error: *.png: no image matches\n"
        assert not Path("out").exists()

    @pytest.mark.parametrize(
        "wrong",
        [
            ["--tile", "8"],
            ["--batch", "0"],
            ["--layout", "round"],
            ["--precision", "float16"],
            ["--threads", "0"],
            ["--format", "gif"],
            ["--device", "cuda:99"],
            ["--limit", "0"],
            ["--zoom", "3"],
        ],
    )
    def test_usage(self, here, wrong, capsys):
        with pytest.raises(SystemExit) as caught:
            upscale_py("a.png", *wrong)
        assert caught.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert ": error: " in message
        assert wrong[0] in message

    def test_how_it_is_computed_does_not_show(self, here, model):
        save("a.png", (90, 70))
        assert upscale_py("a.png") == 0
        assert model.calls == [(1, 3, 70, 90)]
        expected = read_image(Path("out/a.png")).rgb

        def again(*options):
            model.calls.clear()
            assert upscale_py("a.png", "--overwrite", *options) == 0
            return (read_image(Path("out/a.png")).rgb - expected).abs()

        assert again("--tile", "32", "--batch", "3").max() <= 1.01 / 255
        assert [shape[0] for shape in model.calls] == [3, 3]
        # The authors' tiles see nothing of their neighbors, and use all of what they give.
        assert again("--layout", "averaged", "--tile", "64", "--batch", "2").max() > 1.01 / 255
        assert model.calls == [(2, 3, 64, 64)] * 2
        assert again("--layout", "averaged").max() == 0
        assert model.calls == [(1, 3, 70, 90)]

    def test_half_the_bits_are_nearly_as_good(self, here):
        save("a.png", (40, 30))
        assert upscale_py("a.png") == 0
        expected = read_image(Path("out/a.png")).rgb
        assert upscale_py("a.png", "--overwrite", "--precision", "bfloat16") == 0
        difference = (read_image(Path("out/a.png")).rgb - expected).abs()
        assert 0.5 / 255 < difference.max() <= 2.01 / 255

    def test_what_is_true_of_every_image_is_said_once(self, here, model, capsys):
        save("a.png")
        save("b.png")

        def forward(lr):
            raise UsageError("--compile: no")

        model.forward = forward
        assert upscale_py("a.png", "b.png") == 2
        assert capsys.readouterr().err == "error: --compile: no\n"

    def test_bugs_are_not_hidden(self, here, model):
        save("a.png")
        model.forward = lambda lr: lr.unknown
        with pytest.raises(AttributeError, match="unknown"):
            upscale_py("a.png")


def test_foreign_weights_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("a.png")
    Path("w.safetensors").write_text("not weights")
    assert upscale_py("a.png", "--weights", "w.safetensors") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: w.safetensors: ")
    assert len(err.splitlines()) == 1
    assert not Path("out").exists()
