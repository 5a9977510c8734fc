"""compare.py: the quick study in little, its cache, its measures against independent ones."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import compare
from study import gradients, page, predictors, tokenizers
from study.images import Images, joined
from study.measures import describe_texture, effective_dimension, explained, spectrum, surroundings
from study.plan import EXPERIMENTS, Extent, planned, rows_of
from study.priors import PRIORS
from study.quantizers import QUANTIZERS, start_simvq
from study.report import read_content
from study.runner import Runner, as_json
from study.setting import Setting, reports
from study.summary import agreement
from study.table import METHODS, GradientRow
from study.windows import Windows
from tvqrap.cli import UserError, run
from vqprior import VectorQuantizer

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "priors.md"
NOW = Extent(seeds=1, scale=1e-9)  # one step of everything


@pytest.fixture
def setting(folders):
    return Setting(Images(*folders, most=2), quiet=True)


def command(folders, out, *options):
    photos, val = folders
    return [
        "--photos", str(photos), "--val", str(val), "--out", str(out), "--quick",
        "--scale", "1e-9", *options,
    ]  # fmt: skip


def width(path):
    with Image.open(path) as image:
        return image.width


@pytest.mark.full
def test_the_quick_study_is_done_once(folders, tmp_path, capsys):
    assert compare.main(command(folders, tmp_path)) is None
    printed = capsys.readouterr().out
    rows = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    names = {path.stem for path in rows}
    extent = dataclasses.replace(compare.QUICK, scale=1e-9)
    listed = {row.name for row in planned(extent, EXPERIMENTS)}
    assert names > listed  # and what these start from
    for question in ("sizes", "features", "equal-bits", "prediction", "gradients", "stride"):
        assert f"### {question}\n" in printed
    for name in ("sizes", "features", "equal-bits", "prediction", "training", "gradients"):
        assert width(tmp_path / f"{name}.png") > 500
    for name in ("sizes", "equal-bits", "prediction"):
        assert width(tmp_path / f"{name}-images.png") > 250
    numbers = read_content(tmp_path / "rows.json")["rows"]
    assert set(numbers) == listed
    assert (tmp_path / "tables.md").read_text().strip() == printed.strip()
    lost = next(path for path in rows if path.stem.startswith("plain-residual"))
    lost.unlink()
    compare.main(command(folders, tmp_path))
    assert lost.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in rows.items() if path != lost)
    again = read_content(tmp_path / "rows.json")["rows"][lost.stem]
    was = numbers[lost.stem]
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in was.items() if k != "seconds"
    }


def test_a_folder_of_another_study_is_left_alone(folders, tmp_path, capsys):
    only = ("--only", "sizes", "--held-out", "2")
    Runner(tmp_path, Setting(Images(*folders, most=2), "bfloat16", quiet=True))
    before = sorted(tmp_path.rglob("*"))
    assert run(lambda: compare.main(command(folders, tmp_path, *only))) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pass a new --out" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_page_shows_the_numbers_beside_it():
    """And they are of the configuration that is here."""
    content = json.loads((PAGE.with_suffix(".json")).read_text())
    text = PAGE.read_text()
    other = read_content(PAGE.with_name("priors-cuda.json"))
    assert page.filled(text, content, Extent(), other) == text
    rows = {row.name: row for row in planned(Extent(), EXPERIMENTS)}
    for name, result in (*content["rows"].items(), *other["rows"].items()):
        assert as_json(rows[name]) == result["row"]
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert width(PAGE.with_name(name)) > 300


def test_a_page_is_filled(setting, tmp_path, folders):
    runner = Runner(tmp_path / "out", setting)
    place = tmp_path / "page.md"
    options = command(folders, tmp_path / "out", "--held-out", "2", "--report")
    with pytest.raises(UserError, match="cannot be read"):
        compare.main([*options, "--page", str(place)])
    row = dataclasses.replace(compare.QUICK, scale=1e-9).tokenizer("plain", 0, codebook_size=64)
    runner.result(row)
    places = [f"<!-- {name}: begin --><!-- {name}: end -->" for name in ("head", "sizes")]
    place.write_text("\n".join(["before", *places, "after"]))
    with pytest.raises(UserError, match="features: begin"):
        compare.main([*options, "--page", str(place)])
    place.write_text("before\n<!-- features: begin --><!-- features: end -->\n" + place.read_text())
    compare.main([*options, "--page", str(place)])
    text = place.read_text()
    assert text.startswith("before\n<!-- features: begin -->\n| prior | codes |")
    assert text.endswith("<!-- sizes: end -->\nafter")
    assert "| plain | 64 |" in text
    assert width(tmp_path / "page-sizes.png") > 500
    content = json.loads((tmp_path / "page.json").read_text())
    assert set(content["rows"]) == {row.name}
    assert content["rows"][row.name]["history"]  # which the plots need
    compare.main([*options, "--page", str(place)])
    assert place.read_text() == text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("{}", "trained otherwise")],
)
def test_a_row_that_is_not_what_it_says(setting, tmp_path, content, message):
    runner = Runner(tmp_path, setting)
    row = NOW.tokenizer("plain", 0)
    (tmp_path / "rows" / f"{row.name}.json").write_text(content)
    with pytest.raises(Exception, match=message):
        runner.result(row)


def test_how_far_two_studies_are_apart():
    extent = Extent(seeds=1)
    tokenizer = extent.tokenizer("texture-lr", 0)
    rap, kept = (extent.predictor(tokenizer, name) for name in ("rap", "rap-keep-code-0.01"))
    ours = {
        tokenizer.name: {"psnr": 25.0, "gmsd": 0.1, "frechet": 0.5},
        rap.name: {"psnr": 25.0, "gmsd": 0.1, "frechet": 0.5, "accuracy": 0.25},
        kept.name: {"psnr": 25.0, "gmsd": 0.1, "frechet": 0.5, "accuracy": 0.25},
        "bicubic": {"psnr": 24.0},
    }
    theirs = {
        rap.name: {"psnr": 26.5, "gmsd": 0.1, "frechet": 0.4, "accuracy": 0.125},
        tokenizer.name: {"psnr": 24.75, "gmsd": 0.1, "frechet": 0.5},
        extent.predictor(tokenizer, "soft").name: {"psnr": 20.0},
        "bicubic": {"psnr": 24.0},
    }
    lines = agreement(ours, theirs, extent).splitlines()[2:]
    assert lines == [
        "| tokenizers | 1 | 0.25, 0.25 | 0.0000, 0.0000 | 0.000, 0.000 |  |",
        "| images alone | 1 | 1.50, 1.50 | 0.0000, 0.0000 | 0.100, 0.100 | 0.125, 0.125 |",
    ]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rows": []}'])
def test_numbers_of_another_study_that_are_none(tmp_path, capsys, content):
    place = tmp_path / "rows.json"
    place.write_text(content)
    options = ["--out", str(tmp_path / "out"), "--report", "--against", str(place)]
    assert run(lambda: compare.main(options)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(place) in error


def test_every_row_has_a_name_of_its_own():
    rows = {row for name in EXPERIMENTS for row in rows_of(name, Extent())}
    assert len({row.name for row in rows}) == len(rows) > 200


def test_what_the_command_needs(capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--out", "x"])
    assert "give --photos and --val" in capsys.readouterr().err


def test_a_list_writes_nothing(tmp_path, capsys):
    compare.main(["--out", str(tmp_path / "new"), "--list", "--only", "gradients"])
    assert capsys.readouterr().out.count("gradients-") == 15
    assert not (tmp_path / "new").exists()


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_predictor_and_what_else_it_says(setting, method):
    tokenizer_row = NOW.tokenizer("texture-lr", 0)
    tokenizer, _ = tokenizers.train(tokenizer_row, setting)
    before = [p.clone() for p in tokenizer.parameters()]
    row = NOW.predictor(tokenizer_row, method)
    model = predictors.build(row, tokenizer)
    start = [p.clone() for p in model.predictor.parameters()]
    predictors.train(row, model, setting)
    moved = [
        not torch.equal(a, b) for a, b in zip(start, model.predictor.parameters(), strict=True)
    ]
    assert all(moved)
    kept = [torch.equal(a, b) for a, b in zip(before, tokenizer.parameters(), strict=True)]
    assert all(kept) == (method != "end-to-end")


@pytest.mark.parametrize("prior", PRIORS)
def test_what_passes_the_quantizer(setting, prior):
    """Without codes: the structure and nothing else, or nothing at all."""
    tokenizer, _ = tokenizers.train(NOW.tokenizer(prior, 0), setting)
    texture, structure = torch.randn(2, 1, 64, 8, 8)
    out = tokenizer.meeting(texture, structure)
    nothing = torch.zeros_like(texture)
    if prior == "plain":
        other = tokenizer.meeting.decode(nothing, 2 * structure)
        assert torch.equal(other, tokenizer.meeting.decode(nothing, structure))
    elif prior.startswith("texture"):
        decoded = tokenizer.meeting.decode(tokenizer.meeting.codes.decode(out.indices), structure)
        torch.testing.assert_close(decoded, out.quantized)
        torch.testing.assert_close(
            out.quantized - structure,
            tokenizer.meeting.codes.decode(out.indices),
            atol=1e-5,
            rtol=0,
        )
    elif prior.startswith("structure"):
        assert torch.equal(out.quantized, structure)
        assert bool((out.indices == -1).all())
    else:
        assert not torch.equal(tokenizer.meeting.decode(nothing, structure), structure)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_of_equal_bits(name):
    torch.manual_seed(0)
    choice = QUANTIZERS[name]
    quantizer = choice.make(4096)
    x = torch.randn(2, 16, 16, 64)
    if name not in ("vq", "simvq"):  # k-means with 4096 codes takes its time
        choice.start(quantizer, x)
    out = quantizer(x)
    assert quantizer.bits_per_token == pytest.approx(12, abs=0.05)
    assert out.quantized.shape == x.shape
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    assert torch.equal(quantizer.encode(x), out.indices)
    torch.testing.assert_close(quantizer.quantize_as(x, out.indices).quantized, out.quantized)


def test_simvq_starts_from_data():
    torch.manual_seed(0)
    x = 100 + torch.randn(1, 16, 16, 64)
    quantizer = QUANTIZERS["simvq"].make(8)
    start_simvq(quantizer, x)
    assert quantizer(x).indices.unique().numel() == 8


def test_windows_are_quantized_by_themselves():
    quantizer = Windows(VectorQuantizer(4, 16), 2)
    x = torch.randn(3, 4, 6, 4)
    out = quantizer(x)
    assert out.indices.shape == (3, 2, 3, 2, 2)
    assert torch.equal(out.quantized, quantizer.quantizer(x).quantized)
    mask = torch.zeros(3, 4, 6, dtype=torch.bool)
    mask[:, :2, 2:4] = True
    assert bool((quantizer(x, mask).indices[:, 0, 1] >= 0).all())
    assert int((quantizer(x, mask).indices >= 0).sum()) == 3 * 4


def test_texture_is_described_whatever_its_place():
    torch.manual_seed(0)
    texture = torch.rand(1, 3, 16, 16).repeat(1, 1, 8, 8)
    shifted = texture.roll((8, 8), dims=(2, 3))
    ours, theirs, other = (
        describe_texture(one)
        for one in (texture, shifted, nn.functional.avg_pool2d(texture, 5, 1, 2))
    )
    assert ours.shape == (49, 63)
    inner = 24  # a patch in the middle, which no border touches
    assert 0.5 < float(ours[inner][:6].sum()) < 1.5  # shares of the six filters
    near = (ours[inner] - theirs[inner]).norm()
    assert near < 0.01 * (ours[inner] - other[inner]).norm()


def test_effective_dimension_of_known_spectra():
    torch.manual_seed(0)
    even = torch.randn(100_000, 8) @ torch.linalg.qr(torch.randn(8, 8))[0]
    assert effective_dimension(spectrum(even)) == pytest.approx(8, rel=0.01)
    assert effective_dimension(torch.tensor([0.5, 0.5, 0.0])) == 2
    shares = spectrum(torch.randn(1000, 5) * torch.tensor([1.0, 2, 3, 4, 5]))
    assert float(shares.sum()) == pytest.approx(1)
    assert bool((shares.diff() <= 0).all())


def test_what_a_linear_map_explains():
    torch.manual_seed(0)
    lr = torch.rand(8, 3, 32, 32)
    seen = surroundings(lr, 16)
    assert seen.shape == (8 * 256, 108)
    vectors = seen @ torch.randn(108, 4) + 3
    tested = torch.arange(len(seen)) % 2 == 0
    assert explained(seen, vectors, tested=tested) > 0.999
    noise = vectors + vectors.std(dim=0) * torch.randn_like(vectors)
    assert explained(seen, noise, tested=tested) == pytest.approx(0.5, abs=0.1)
    assert explained(seen, torch.randn(len(seen), 4), tested=tested) < 0.02


def test_held_out_pieces_make_the_middles_of_photos(folders):
    pieces = Images(*folders, most=2).held_out
    assert pieces.hr.shape == (8, 3, 64, 64)
    assert pieces.lr.shape == (8, 3, 16, 16)
    with Image.open(folders[1] / "1.png") as photo:
        whole = np.asarray(photo)[8:136, 16:144]
    found = joined(pieces.hr)[1].movedim(0, -1) * 255
    np.testing.assert_allclose(found.numpy(), whole, atol=1e-3)
    # Each small piece is what its large one becomes.
    means = [part.unflatten(0, (2, 4)).mean(dim=(2, 3, 4)) for part in pieces]
    torch.testing.assert_close(*means, atol=0.01, rtol=0)


def test_surroundings_are_those_of_the_place():
    lr = torch.zeros(1, 3, 16, 16)
    lr[0, 1, 6, 8] = 1  # row 3, column 4 of the places
    seen = surroundings(lr, 8).reshape(8, 8, 3, 6, 6)
    assert float(seen[3, 4, 1, 2, 2]) == 1
    assert int((seen[..., 1, :, :] > 0).flatten(2).any(dim=2).sum()) == 9


def test_the_exact_gradient_is_that_of_the_expected_loss(setting):
    tokenizer_row = NOW.tokenizer("texture-lr", 0)
    tokenizer, _ = tokenizers.train(tokenizer_row, setting)
    row = GradientRow(NOW.predictor(tokenizer_row, "code"), places=1, draws=2)
    model = predictors.build(row.predictor, tokenizer).requires_grad_(requires_grad=False)
    rng = torch.Generator().manual_seed(0)
    held_out = setting.images.held_out
    pair = type(held_out)(held_out.hr[:1], held_out.lr[:1])
    place = gradients._Place(model, pair, rng)
    losses = place.all_losses()
    logits = place.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad((logits.softmax(dim=-1) * losses).sum(), logits)
    found = gradients._compare(place, 2, rng)
    assert found["exact"] == pytest.approx(float(expected.norm()), rel=1e-3)
    # The loss of the code that is chosen is that of the image as it is.
    image, _ = model(pair.lr)
    pixel = (image - pair.hr).abs().mean()
    assert float(losses[place.chosen]) > float(pixel)
    # The loss of each code is the same for a predictor that is surer of the same codes.
    sharp = gradients._Place(model, pair, torch.Generator().manual_seed(0), sharpened=4.0)
    torch.testing.assert_close(sharp.all_losses(), losses)
    expected = (4 * logits.detach()).softmax(dim=-1)
    assert gradients._compare(sharp, 2, rng)["confidence"] == pytest.approx(float(expected.max()))
    # The soft estimate is the exact gradient of what it decodes.
    soft = place.estimates("soft", 1, rng)[0]
    (truth,) = torch.autograd.grad(
        place.losses((logits.softmax(dim=-1) @ place.codes)[None]).sum(), logits
    )
    torch.testing.assert_close(soft, truth, rtol=1e-3, atol=1e-9)


def test_curves_have_a_first_and_a_last_point():
    assert reports(1) == {1}
    assert reports(2) == {1, 2}
    assert {1, 1200} <= reports(1200)
    assert len(reports(1200)) == 12
