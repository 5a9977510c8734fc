"""compare.py: the quick study in little, its cache, its measures against independent ones."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import compare
from study.gradients import Place
from study.measures import describe_texture, effective_dimension, explained, surroundings
from study.plan import Extent, planned
from study.priors import PRIORS
from study.quantizers import QUANTIZERS
from study.report import filled, read_content, tables_of
from study.runner import Runner, as_json
from study.setting import Setting
from study.summary import agreement
from study.table import METHODS
from study.training import build_model, train_predictor, train_tokenizer
from tvqrap.cli import UserError, run

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "priors.md"
NOW = Extent(seeds=1, scale=1e-9)  # one step of everything


@pytest.fixture
def setting(folders):
    return Setting(*folders, most=2)


def command(folders, out, *options):
    photos, val = folders
    return [
        "--photos", str(photos), "--val", str(val), "--out", str(out), "--quick",
        "--scale", "1e-9", *options,
    ]  # fmt: skip


@pytest.mark.full
def test_the_quick_study_is_done_once(folders, tmp_path, capsys):
    assert compare.main(command(folders, tmp_path)) is None
    printed = capsys.readouterr().out
    rows = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").iterdir()}
    listed = {row.name for row in planned(dataclasses.replace(compare.QUICK, scale=1e-9))}
    assert {path.stem for path in rows} > listed  # and what these start from
    for table in ("head", "sizes", "features", "equal-bits", "prediction", "gradients", "stride"):
        assert f"### {table}\n" in printed
    numbers = read_content(tmp_path / "rows.json")["rows"]
    assert set(numbers) == listed
    assert (tmp_path / "tables.md").read_text().strip() == printed.strip()
    lost = next(path for path in rows if path.stem.startswith("plain-residual"))
    lost.unlink()
    compare.main(command(folders, tmp_path))
    assert all(path.stat().st_mtime_ns == time for path, time in rows.items() if path != lost)
    again, was = read_content(tmp_path / "rows.json")["rows"][lost.stem], numbers[lost.stem]
    assert again | {"seconds": 0} == was | {"seconds": 0}


def test_a_folder_of_another_study_is_left_alone(folders, tmp_path, capsys):
    Runner(tmp_path, Setting(*folders, most=2, precision="bfloat16"))
    before = sorted(tmp_path.rglob("*"))
    only = ("--only", "sizes", "--held-out", "2")
    assert run(lambda: compare.main(command(folders, tmp_path, *only))) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pass a new --out" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_page_shows_the_numbers_beside_it():
    """And they are of the rows that are here."""
    content = read_content(PAGE.with_suffix(".json"))
    other = read_content(PAGE.with_name("priors-cuda.json"))
    text = PAGE.read_text()
    assert filled(text, tables_of(content, Extent(), other)) == text
    rows = {row.name: row for row in planned(Extent())}
    assert len(rows) > 200
    for name, result in (*content["rows"].items(), *other["rows"].items()):
        assert as_json(rows[name]) == result["row"]
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        with Image.open(PAGE.with_name(name)) as image:
            assert image.width > 300


def test_a_page_is_filled(setting, tmp_path, folders):
    place = tmp_path / "page.md"
    options = command(folders, tmp_path / "out", "--report", "--page", str(place))
    row = dataclasses.replace(compare.QUICK, scale=1e-9).tokenizer("plain", 0, codebook_size=64)
    Runner(tmp_path / "out", setting).result(row)
    with pytest.raises(UserError, match="cannot be read"):
        compare.main(options)
    places = [f"<!-- {name}: begin --><!-- {name}: end -->" for name in ("head", "sizes")]
    place.write_text("\n".join(["before", *places, "after"]))
    with pytest.raises(UserError, match="features: begin"):
        compare.main(options)
    place.write_text("before\n<!-- features: begin --><!-- features: end -->\n" + place.read_text())
    compare.main(options)
    text = place.read_text()
    assert text.startswith("before\n<!-- features: begin -->\n| prior | codes |")
    assert text.endswith("<!-- sizes: end -->\nafter")
    assert "| plain | 64 |" in text
    assert set(read_content(tmp_path / "page.json")["rows"]) == {row.name}
    compare.main(options)
    assert place.read_text() == text


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("{}", "was trained with another table")]
)
def test_a_row_that_is_not_what_it_says(setting, tmp_path, content, message):
    runner = Runner(tmp_path, setting)
    row = NOW.tokenizer("plain", 0)
    (tmp_path / "rows" / f"{row.name}.json").write_text(content)
    with pytest.raises(UserError, match=message):
        runner.result(row)


def test_how_far_two_studies_are_apart():
    extent = Extent(seeds=1)
    tokenizer = extent.tokenizer("texture-lr", 0)
    rap, kept, soft = (
        extent.predictor(tokenizer, name) for name in ("rap", "rap-keep-code-0.01", "soft")
    )
    same = {"psnr": 25.0, "gmsd": 0.1, "frechet": 0.5, "accuracy": 0.25}
    ours = {
        tokenizer.name: {"psnr": 25.0, "gmsd": 0.1, "frechet": 0.5},
        rap.name: same, kept.name: same, "bicubic": {"psnr": 24.0},
    }  # fmt: skip
    theirs = {
        rap.name: {"psnr": 26.5, "gmsd": 0.1, "frechet": 0.4, "accuracy": 0.125},
        tokenizer.name: {"psnr": 24.75, "gmsd": 0.1, "frechet": 0.5},
        soft.name: {"psnr": 20.0}, "bicubic": {"psnr": 24.0},
    }  # fmt: skip
    assert agreement(ours, theirs, extent).splitlines()[2:] == [
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


def test_what_the_command_needs(capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--out", "x"])
    assert "give --photos and --val" in capsys.readouterr().err


def test_a_list_writes_nothing(tmp_path, capsys):
    compare.main(["--out", str(tmp_path / "new"), "--list", "--only", "gradients"])
    assert capsys.readouterr().out.count("gradients-") == 15
    assert not (tmp_path / "new").exists()


def test_an_interrupted_study_goes_on(folders, tmp_path, monkeypatch, capsys):
    options = command(folders, tmp_path, "--only", "sizes", "--held-out", "2")
    do, done = Runner._measure, []

    def stopped(self, row):
        done.append(row)
        if len(done) == 3:
            raise KeyboardInterrupt
        return {"psnr": 1.0} if len(done) != 1 else do(self, row)

    monkeypatch.setattr(Runner, "_measure", stopped)
    assert run(lambda: compare.main(options)) == 130
    assert len(list((tmp_path / "rows").iterdir())) == 2
    compare.main(options)
    assert done[3] == done[2]
    assert len(set(done)) == len(done) - 1 == len(list((tmp_path / "rows").iterdir()))


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_predictor_and_what_else_it_says(setting, method):
    tokenizer_row = NOW.tokenizer("texture-lr", 0)
    tokenizer = train_tokenizer(tokenizer_row, setting)
    before = [p.clone() for p in tokenizer.parameters()]
    row = NOW.predictor(tokenizer_row, method)
    model = build_model(row, tokenizer)
    start = [p.clone() for p in model.predictor.parameters()]
    train_predictor(row, model, setting)
    assert not any(map(torch.equal, start, model.predictor.parameters()))
    assert all(map(torch.equal, before, tokenizer.parameters())) == (method != "end-to-end")


@pytest.mark.parametrize("prior", PRIORS)
def test_what_passes_the_quantizer_and_what_goes_around_it(setting, prior):
    row = NOW.tokenizer(prior, 0)
    tokenizer = train_tokenizer(row, setting)
    hr, lr = setting.hr[:2], setting.lr[:2]
    texture = tokenizer.texture(hr)
    structure = tokenizer.structure.expand(tokenizer.structure.features(hr, lr, texture))
    prepared = tokenizer.quantizer.fuse(structure, texture)
    assert structure.shape == prepared.shape == (2, tokenizer.config.code_dim, 8, 8)
    assert (structure.abs().sum() == 0) == (prior == "plain")
    assert torch.equal(prepared, texture) == (prior in ("plain", "skip"))
    assert tokenizer.structure.regressed == (prior in ("skip", "texture", "structure"))
    losses = tokenizer.structure.losses(tokenizer.structure.features(hr, lr, texture), hr)
    assert bool(losses) == tokenizer.structure.regressed


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_of_equal_bits(name):
    torch.manual_seed(0)
    choice = QUANTIZERS[name]
    quantizer = choice.make(64, 4096)
    x = torch.randn(8, 8, 8, 64)
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
    quantizer = QUANTIZERS["simvq"].make(64, 8)
    QUANTIZERS["simvq"].start(quantizer, x)
    assert quantizer(x).indices.unique().numel() == 8


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
    assert effective_dimension(even) == pytest.approx(8, rel=0.01)
    assert effective_dimension(even[:, :3] * torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(
        2, 0.01
    )


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


def test_surroundings_are_those_of_the_place():
    lr = torch.zeros(1, 3, 16, 16)
    lr[0, 1, 6, 8] = 1  # row 3, column 4 of the places
    seen = surroundings(lr, 8).reshape(8, 8, 3, 6, 6)
    assert float(seen[3, 4, 1, 2, 2]) == 1
    assert int((seen[..., 1, :, :] > 0).flatten(2).any(dim=2).sum()) == 9


def test_held_out_pieces_make_the_middles_of_photos(folders, setting):
    hr, lr = setting.hr, setting.lr
    assert (hr.shape, lr.shape) == ((8, 3, 64, 64), (8, 3, 16, 16))
    with Image.open(folders[1] / "1.png") as photo:
        whole = np.asarray(photo)[8:136, 16:144]
    joined = hr[4:].unflatten(0, (2, 2)).permute(0, 3, 1, 4, 2).flatten(2).flatten(0, 1)
    np.testing.assert_allclose(joined.unflatten(1, (128, 3)).numpy() * 255, whole, atol=1e-3)
    # Each small piece is what its large one becomes.
    means = [part.unflatten(0, (2, 4)).mean(dim=(2, 3, 4)) for part in (hr, lr)]
    torch.testing.assert_close(*means, atol=0.01, rtol=0)


def test_the_exact_gradient_is_that_of_the_expected_loss(setting):
    row = NOW.predictor(NOW.tokenizer("texture-lr", 0), "code")
    tokenizer = train_tokenizer(row.tokenizer, setting)
    model = build_model(row, tokenizer).requires_grad_(requires_grad=False)
    hr, lr = setting.hr[:1], setting.lr[:1]
    rng = torch.Generator().manual_seed(0)
    place = Place(model, hr, lr, torch.Generator().manual_seed(0))
    losses = place.all_losses()
    logits = place.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad((logits.softmax(dim=-1) * losses).sum(), logits)
    assert place.compare(2, rng)["exact"] == pytest.approx(float(expected.norm()), rel=1e-3)
    # The loss of the code that is chosen is that of the image as it is.
    image = model.reconstruct(model.predict(lr), lr)
    chosen = float(losses[int(place.chosen[place.place])])
    assert chosen == pytest.approx(float(place.objective(image, hr)[0]), rel=1e-5)
    # The loss of each code is the same for a predictor that is surer of the same codes.
    sharp = Place(model, hr, lr, torch.Generator().manual_seed(0), sharpened=4.0)
    torch.testing.assert_close(sharp.all_losses(), losses)
    expected = (4 * logits.detach()).softmax(dim=-1)
    assert sharp.compare(2, rng)["confidence"] == pytest.approx(float(expected.max()))
    # The soft estimate is the exact gradient of what it decodes.
    soft = place.estimates("soft", 1, rng)[0]
    (truth,) = torch.autograd.grad(
        place.losses((logits.softmax(dim=-1) @ place.codes)[None]).sum(), logits
    )
    torch.testing.assert_close(soft, truth, rtol=1e-3, atol=1e-9)
