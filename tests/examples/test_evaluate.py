"""evaluate.py: numbers against independent ones, files that lack a partner, and what is written."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import evaluate
from evaluate import Scores, detail_energy, format_table, measure
from tests.examples.stand_in import StandIn
from tvqrap.cli import UserError, run
from tvqrap.images.pairs import Pair, make_pair, pair_loaders, photo_loaders, read_pair


@pytest.fixture
def model(monkeypatch):
    model = StandIn().eval()
    monkeypatch.setattr(evaluate, "load_super_resolver", lambda path: model)
    return model


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(width=48, height=40, seed=0):
    """Something between noise and a photo: large shapes and fine detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    fine = rng.integers(-40, 41, (height, width, 3))
    smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))


def save(image, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_pairs(*names):
    for seed, name in enumerate(names):
        hr = photo(seed=seed)
        save(hr, f"pairs/HR/{name}")
        save(
            hr.resize((hr.width // 4, hr.height // 4), Image.Resampling.BICUBIC), f"pairs/LR/{name}"
        )


def levels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def evaluate_py(*arguments):
    return run(lambda: evaluate.main(list(arguments)))


def test_psnr_is_that_of_the_papers():
    original, other = photo(), photo(seed=1)
    luma = [
        16 + np.array(image).astype(float)[4:-4, 4:-4] @ [65.481, 128.553, 24.966] / 255
        for image in (original, other)
    ]
    expected = 10 * np.log10(255**2 / ((luma[0] - luma[1]) ** 2).mean())
    assert measure(levels(other), levels(original)).psnr == pytest.approx(expected, abs=1e-4)


def test_the_border_is_not_looked_at():
    original = levels(photo())
    spoiled = original.clone()
    spoiled[:, :4], spoiled[:, -4:], spoiled[..., :4], spoiled[..., -4:] = 0, 0, 0, 0
    scores = measure(spoiled, original)
    assert scores.psnr == float("inf")
    assert scores[1:] == pytest.approx((1, 0, 1))
    spoiled[:, 4, 4] = 255 - spoiled[:, 4, 4]
    assert measure(spoiled, original).psnr < 70


def test_blur_loses_in_every_score_and_loses_detail():
    original = photo(96, 96)
    blurred = [levels(original.filter(ImageFilter.GaussianBlur(r))) for r in (0.6, 2)]
    little, much = (measure(image, levels(original)) for image in blurred)
    assert little.psnr > much.psnr
    assert little.ssim > much.ssim
    assert little.gmsd < much.gmsd
    assert 1 > little.detail > much.detail
    assert much.detail < 0.05


@pytest.mark.parametrize(
    ("cycles", "beyond"), [(0.05, False), (0.11, False), (0.14, True), (0.4, True)]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_detail_is_what_a_quarter_of_the_size_cannot_hold(cycles, beyond, axis):
    wave = torch.sin(2 * torch.pi * cycles * torch.arange(128.0))
    image = wave[:, None].expand(128, 128) if axis == 0 else wave.expand(128, 128)
    share = detail_energy(image[None, None]) / (
        torch.fft.fft2(image * torch.outer(torch.hann_window(128), torch.hann_window(128)))
        .abs()
        .square()
        .sum()
    )
    assert share > 0.99 if beyond else share < 0.01


def test_evaluate_measures_what_upscale_would_write(model):
    hr = photo(64, 40)
    lr = hr.resize((16, 10), Image.Resampling.BICUBIC)
    pairs = [Pair("a", levels(hr), levels(lr)), Pair("b", levels(hr), levels(lr))]
    seen = []
    result = evaluate.evaluate(model, pairs, each=lambda *arguments: seen.append(arguments))
    with torch.no_grad():
        expected = model(levels(lr)[None] / 255)[0].clamp(0, 1).mul(255).round().to(torch.uint8)
    bicubic = levels(lr.resize((64, 40), Image.Resampling.BICUBIC))
    row = result.rows[0]
    assert row.model == pytest.approx(measure(expected, levels(hr)))
    assert row.bicubic == pytest.approx(measure(bicubic, levels(hr)))
    assert row.seconds > 0
    assert [(pair.name, at.name) for pair, _, at in seen] == [("a", "a"), ("b", "b")]
    assert torch.equal(seen[0][1], expected)
    indices = model.indices(levels(lr)[None] / 255)
    assert result.usage == len(indices.unique()) / 16
    counts = indices.unique(return_counts=True)[1].double() / indices.numel()
    assert result.perplexity == pytest.approx(float(torch.exp(-(counts * counts.log()).sum())))
    assert result.codebook_size == 16


def test_codes_are_counted_over_all_of_a_large_image(model):
    lr = torch.zeros(3, 40, 70, dtype=torch.uint8)
    lr[:, -1, -1] = 255
    hr = levels(photo(280, 160))
    whole = evaluate.evaluate(model, [Pair("a", hr, lr)], tile=256)
    tiled = evaluate.evaluate(model, [Pair("a", hr, lr)], tile=32)
    assert whole.usage == tiled.usage == 2 / 16
    assert whole.perplexity == pytest.approx(tiled.perplexity)


def test_a_model_that_chooses_no_codes(model):
    model.indices = lambda lr: torch.full((1, 2, 2), -1)
    result = evaluate.evaluate(model, [make_pair_of(photo())])
    assert (result.usage, result.perplexity) == (0, 0)
    assert format_table(result).splitlines()[-1].startswith("codebook: none of 16 codes chosen")


def make_pair_of(image):
    small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BICUBIC)
    return Pair("x", levels(image), levels(small))


def test_mean(model):
    pairs = [make_pair_of(photo(seed=seed)) for seed in range(3)]
    result = evaluate.evaluate(model, pairs)
    for kind in ("bicubic", "model"):
        columns = zip(*(getattr(row, kind) for row in result.rows), strict=True)
        assert getattr(result.mean, kind) == pytest.approx(Scores(*(np.mean(c) for c in columns)))


def test_a_photo_is_cut_to_multiples_of_four(here):
    image = photo(50, 43)
    save(image, "a.png")
    pair = make_pair(Path("a.png"))
    assert torch.equal(pair.hr, levels(image)[:, :40, :48])
    expected = image.crop((0, 0, 48, 40)).resize((12, 10), Image.Resampling.BICUBIC)
    assert torch.equal(pair.lr, levels(expected))


def test_pairs_are_found_by_name(here):
    save_pairs("b.png", "a.png")
    assert [loader().name for loader in pair_loaders(Path("pairs"))] == ["a.png", "b.png"]


def test_small_images_may_be_marked_or_of_another_format(here):
    for name in ("HR/a.png", "HR/b.png", "HR/cx4.png", "LR/ax4.png", "LR/b.jpg", "LR/cx4.png"):
        save(photo(), f"pairs/{name}")
    partners = [loader.args for loader in pair_loaders(Path("pairs"))]
    assert [tuple(path.name for path in pair) for pair in partners] == [
        ("a.png", "ax4.png"), ("b.png", "b.jpg"), ("cx4.png", "cx4.png"),
    ]  # fmt: skip


def test_missing_and_ambiguous_partners_are_named(here):
    save_pairs("a.png", "b.png", "c.png", "d.png")
    Path("pairs/LR/a.png").unlink()
    Path("pairs/HR/c.png").unlink()
    save(photo(), "pairs/LR/d_x4.png")
    names = "HR/a.png, HR/d.png, LR/c.png, LR/d.png, LR/d_x4.png;"
    with pytest.raises(UserError, match=rf"pairs: no partner, or several, .* for {names}"):
        pair_loaders(Path("pairs"))


@pytest.mark.parametrize(("size", "cut"), [((79, 71), (48, 40)), ((46, 43), (44, 40))])
def test_images_that_do_not_fit_are_cut(size, cut, here):
    save_pairs("a.png")
    whole = photo(*size)
    save(whole, "pairs/HR/a.png")
    pair = read_pair(Path("pairs/HR/a.png"), Path("pairs/LR/a.png"))
    assert torch.equal(pair.hr, levels(whole)[:, : cut[1], : cut[0]])
    assert pair.lr.shape == (3, cut[1] // 4, cut[0] // 4)
    assert pair.note.endswith(f"{cut[0]}x{cut[1]} of {size[0]}x{size[1]} are measured")


@pytest.mark.parametrize("size", [(80, 40), (48, 36)])
def test_sizes_must_fit(size, here):
    save_pairs("a.png")
    save(photo(*size), "pairs/HR/a.png")
    message = rf"HR/a.png: is {size[0]}x{size[1]}, which is not 4 times the 12x10 of .*LR"
    with pytest.raises(UserError, match=message):
        read_pair(Path("pairs/HR/a.png"), Path("pairs/LR/a.png"))


def test_too_small_to_measure(here):
    save(photo(31, 60), "a.png")
    save(photo(2, 2), "b.png")
    for name in ("a.png", "b.png"):
        with pytest.raises(UserError, match="the smallest size that can be measured is 32x32"):
            make_pair(Path(name))


@pytest.mark.parametrize("find", [pair_loaders, photo_loaders])
def test_folders_that_are_missing(find, here):
    with pytest.raises(UserError, match="no such folder"):
        find(Path("nowhere"))


@pytest.mark.usefixtures("model")
class TestTheScript:
    def test_table_file_and_image(self, here, capsys):
        save_pairs("a.png", "b.png")
        status = evaluate_py(
            "--pairs", "pairs", "--csv", "out/t.csv", "--image", "out/p.jpg"
        )  # fmt: skip
        lines = capsys.readouterr().out.splitlines()
        assert status == 0
        assert [line.split()[0] for line in lines[2:]] == ["a.png", "b.png", "mean", "codebook:"]
        assert len({len(line) for line in lines[1:5]}) == 1  # the columns are straight
        with Path("out/t.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == ["a.png", "b.png", "mean"]
        assert list(rows[0]) == [
            "name", "bicubic_psnr", "model_psnr", "bicubic_ssim", "model_ssim", "bicubic_gmsd",
            "model_gmsd", "bicubic_detail", "model_detail", "seconds",
        ]  # fmt: skip
        pair = read_pair(Path("pairs/HR/a.png"), Path("pairs/LR/a.png"))
        bicubic = Image.open("pairs/LR/a.png").resize((48, 40), Image.Resampling.BICUBIC)
        scores = measure(levels(bicubic), pair.hr)
        assert float(rows[0]["bicubic_psnr"]) == pytest.approx(scores.psnr, rel=1e-5)
        assert float(rows[0]["bicubic_gmsd"]) == pytest.approx(scores.gmsd, rel=1e-5)
        with Image.open("out/p.jpg") as image:
            assert image.width == 10 + 3 * (2 * 48 + 10)

    def test_photos_and_limit(self, here, capsys):
        for name in ("a.png", "b.jpg", "c.webp"):
            save(photo(), f"photos/{name}")
        assert evaluate_py("--photos", "photos", "--limit", "2") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[2:]] == ["a.png", "b.jpg", "mean", "codebook:"]

    def test_a_damaged_photo_is_named_and_left_out(self, here, capsys):
        save(photo(), "photos/b.png")
        Path("photos/a.png").write_bytes(b"")
        assert evaluate_py("--photos", "photos") == 1
        out, err = capsys.readouterr()
        assert err == "error: photos/a.png: is empty\n"
        assert "b.png" in out

    def test_nothing_left_to_measure(self, here, capsys):
        Path("photos").mkdir()
        Path("photos/a.png").write_bytes(b"")
        assert evaluate_py("--photos", "photos", "--csv", "t.csv") == 1
        assert capsys.readouterr().err.splitlines()[1:] == [
            "error: none of the images could be measured"
        ]
        assert not Path("t.csv").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--csv", "photos"], "photos: is a folder; pass the name of a file"),
            (["--csv", "photos/a.png/t.csv"], "cannot write to this folder"),
            (["--image", "p.gif"], "must end in one of"),
        ],
    )
    def test_results_that_cannot_be_written_are_found_before_the_work(
        self, here, model, arguments, message, capsys
    ):
        save(photo(), "photos/a.png")
        assert evaluate_py("--photos", "photos", *arguments) != 0
        assert message in capsys.readouterr().err
        assert model.calls == []

    def test_pairs_or_photos(self, here, capsys):
        for arguments in ([], ["--pairs", "a", "--photos", "b"]):
            with pytest.raises(SystemExit) as caught:
                evaluate_py(*arguments)
            assert caught.value.code == 2
