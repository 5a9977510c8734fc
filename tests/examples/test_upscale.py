"""upscale.py as its user meets it: what is written, what is refused, and what is said."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import upscale
from tests.examples.stand_in import StandIn
from tvqrap.cli import UsageError, UserError, run
from tvqrap.images.files import Photo, read_image
from tvqrap.images.jobs import Job, plan_jobs
from tvqrap.images.panels import comparison, find_detail
from upscale import check_input_size, pick_device, spread_color, upscale_photo

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

    def test_too_large_for_the_format_is_found_before_the_work(self, here, model, capsys):
        save("a.png", (4100, 8))
        assert upscale_py("a.png", "--format", "webp") == 1
        assert "at most 16383 pixels a side, this one is 16400x32" in capsys.readouterr().err
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


def names(*sources, compare=False):
    jobs = plan_jobs([Path(source) for source in sources], Path("out"), "png", compare=compare)
    return [job.result.name for job in jobs]


def test_names_that_would_meet_are_kept_apart():
    assert names("a.png", "b.png") == ["a.png", "b.png"]
    assert names("a.png", "a.jpg", "b.png") == ["a_png.png", "a_jpg.png", "b.png"]
    assert names("A.png", "a.jpg") == ["A_png.png", "a_jpg.png"]
    assert names("x/a.png", "y/a.png") == ["x_a_png.png", "y_a_png.png"]
    assert names("x/y/a.png", "z/y/a.png") == ["y_a_png.png", "y_a_png_2.png"]
    assert names("a.png", "a_comparison.png") == ["a.png", "a_comparison.png"]
    assert names("a.png", "a_comparison.png", compare=True) == ["a.png", "a_comparison_2.png"]
    assert names("a.b.png") == ["a.b.png"]


def test_no_two_jobs_share_a_file():
    sources = [
        f"{d}/{n}.{s}" for d in ("x", "y/x") for n in ("a", "A", "a_png") for s in ("png", "jpg")
    ]
    jobs = plan_jobs([Path(source) for source in sources], Path("out"), "jpg", compare=True)
    outputs = [str(path).lower() for job in jobs for path in job.outputs]
    assert len(set(outputs)) == len(outputs) == 24


def test_sizes():
    check_input_size(8, 8)
    check_input_size(2500, 1250)
    with pytest.raises(UserError, match=r"is 8x7; the smallest size is 8x8"):
        check_input_size(8, 7)
    with pytest.raises(
        UserError, match="is 2501x1250, so the result would have 50 megapixels; the"
    ):
        check_input_size(2501, 1250)


def test_sixteen_bits_in_between_levels_survive():
    gray = torch.linspace(0.5, 0.51, 20).expand(3, 16, 20)
    photo = Photo(gray, grayscale=True, bit_depth=16)
    deep = upscale_photo(StandIn().eval(), photo)
    assert deep.rgb.dtype == torch.uint16
    assert len(deep.rgb.to(torch.int32).unique()) > 60
    assert upscale_photo(StandIn().eval(), photo, deep=False).rgb.dtype == torch.uint8


def test_alpha_is_upscaled_beside_the_colors():
    alpha = torch.zeros(1, 16, 16)
    alpha[:, :, 8:] = 1
    result = upscale_photo(StandIn().eval(), Photo(torch.rand(3, 16, 16), alpha))
    assert result.alpha.shape == (1, 64, 64)
    assert result.alpha[0, :, 20].max() == 0
    assert result.alpha[0, :, 43].min() == 255


def test_hidden_colors_do_not_bleed_into_visible_ones():
    alpha = torch.zeros(1, 32, 32)
    alpha[:, 8:24, 8:24] = 1
    rgb = alpha * torch.tensor([0.9, 0.6, 0.3])[:, None, None]  # and black where it is invisible
    filled = spread_color(rgb, alpha)
    assert torch.equal(filled[:, 8:24, 8:24], rgb[:, 8:24, 8:24])
    torch.testing.assert_close(filled[:, 4, 16], torch.tensor([0.9, 0.6, 0.3]))
    result = upscale_photo(StandIn().eval(), Photo(rgb, alpha))
    colors = result.rgb[:, result.alpha[0] > 100].int()  # the visible square and half its rim
    assert (colors.amax(dim=1) - colors.amin(dim=1)).max() < 30


def test_detail_is_where_the_contrast_is():
    image = Image.new("L", (100, 80), 128)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    image.paste(Image.fromarray(noise), (70, 10))
    left, top, right, bottom = find_detail(image, 24)
    assert left <= 70
    assert top <= 10
    assert right >= 90
    assert bottom >= 30
    assert (right - left, bottom - top) == (24, 24)
    assert find_detail(image.crop((0, 0, 9, 8)), 24) == (0, 0, 9, 8)


@pytest.mark.parametrize("size", [(8, 8), (60, 60), (150, 90), (400, 8), (8, 400)])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_comparison_is_drawn_for_any_size(size, alpha):
    width, height = size
    photo = Photo(
        torch.rand(3, height, width),
        None if alpha is None else torch.full((1, height, width), alpha),
    )
    sheet = comparison(photo, upscale_photo(StandIn().eval(), photo))
    assert sheet.mode == "RGB"
    assert 200 < sheet.width < 1400
    assert sheet.height < 1400


def test_bicubic_is_on_the_left():
    photo = Photo(torch.full((3, 100, 100), 0.2))
    white = Photo(torch.ones(3, 400, 400))
    sheet = np.array(comparison(photo, white))
    assert sheet[200, 60].tolist() == [51] * 3
    assert sheet[200, 10 + 400 + 60].tolist() == [255] * 3


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: this machine or this build"):
            pick_device("cuda")


def test_a_job_lists_its_files():
    assert Job(Path("a"), Path("b")).outputs == (Path("b"),)
    assert Job(Path("a"), Path("b"), Path("c")).outputs == (Path("b"), Path("c"))
