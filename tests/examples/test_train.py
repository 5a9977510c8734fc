"""The trainer, as a user runs it: three stages, killed and resumed, and from other weights."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import train
from tests.examples.little_train import ENVIRONMENT, SCRIPT
from tests.examples.training import checkpoint, command, last_row
from tvqrap.cli import UserError
from tvqrap.models.weights import load_super_resolver
from tvqrap.training.ranks import Ranks
from tvqrap.training.recipes import RECIPES
from tvqrap.training.stages import TokenizerStage
from tvqrap.training.update import Critic, Update

pytestmark = pytest.mark.usefixtures("little_presets")


@pytest.mark.full
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_three_stages_leave_weights_log_samples_and_plot(preset, photos, tmp_path):
    out = tmp_path / "out"
    for stage in ("tokenizer", "predictor", "rap"):
        train.main(command(stage, photos, out, "--preset", preset, "--steps", "3"))
        row = last_row(out / stage)
        assert row["step"] == 3
        assert row["loss"] > 0
        with Image.open(out / stage / "plot.png") as plot:
            assert plot.size[0] > 100
        assert list((out / stage / "samples").iterdir())
        if (stage, preset) != ("tokenizer", "small"):  # a regressed structure needs a predictor
            model = load_super_resolver(out / f"{stage}.safetensors")
            assert model(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)


def test_rap_moves_the_predictor_and_leaves_the_prior_alone(photos, tmp_path):
    for stage in ("tokenizer", "predictor", "rap"):
        train.main(command(stage, photos, tmp_path / "out", "--steps", "2"))
    assert 0 < last_row(tmp_path / "out" / "rap")["code"] < 0.1  # a hundredth of log 512 at most
    before, after = (
        load_file(tmp_path / "out" / f"{stage}.safetensors") for stage in ("predictor", "rap")
    )
    for name, value in before.items():
        same = torch.equal(value, after[name])
        if name.startswith("tokenizer."):
            assert same, f"{name} moved"
    assert not torch.equal(
        before["predictor.head.head.weight"], after["predictor.head.head.weight"]
    )


@pytest.mark.parametrize("adversarial", ["0", "0.75"])
@pytest.mark.parametrize("stage", ["tokenizer", "rap"])
def test_resumed_training_equals_uninterrupted_training(stage, adversarial, photos, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    more = ("--adversarial", adversarial)
    for out in (whole, split):
        if stage == "rap":
            for earlier in ("tokenizer", "predictor"):
                train.main(command(earlier, photos, out, "--steps", "1"))
    train.main(command(stage, photos, whole, "--steps", "7", *more))
    train.main(command(stage, photos, split, "--steps", "3", *more))
    torch.manual_seed(123)
    train.main(command(stage, photos, split, "--steps", "7", "--resume", *more))
    expected = load_file(whole / f"{stage}.safetensors")
    assert_close(load_file(split / f"{stage}.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.full
def test_killed_at_a_random_moment_and_resumed(photos, tmp_path):
    """SIGKILL gives the process no chance to tidy up; the last checkpoint must be enough."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def line(out, *more):
        options = command("tokenizer", photos, out, "--steps", "400", *more)
        return [sys.executable, SCRIPT, shlex.join(options)]

    quiet = {"env": ENVIRONMENT, "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    subprocess.run(line(whole), check=True, **quiet)
    process = subprocess.Popen(line(killed), **quiet)
    checkpoint = killed / "tokenizer" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(float(np.random.default_rng().uniform(0, 1)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(line(killed, "--resume"), check=True, **quiet)
    expected = load_file(whole / "tokenizer.safetensors")
    assert_close(load_file(killed / "tokenizer.safetensors"), expected, rtol=0, atol=0)


def test_minutes_end_the_training_and_count_over_resumes(photos, tmp_path):
    train.main(command("tokenizer", photos, tmp_path, "--minutes", "0.01"))
    first = checkpoint(tmp_path)["progress"]
    assert first["done"] >= 1
    assert first["seconds"] >= 0.6
    train.main(command("tokenizer", photos, tmp_path, "--minutes", "0.01", "--resume"))
    again = checkpoint(tmp_path)["progress"]
    assert again["done"] == first["done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_save(number, photos, tmp_path, monkeypatch):
    before = signal.getsignal(number)  # SIGINT is ignored where tests run in the background
    out = tmp_path / "out"
    compute, calls = Update.compute, []

    def interrupted(self, *arguments):
        calls.append(self)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return compute(self, *arguments)

    monkeypatch.setattr(Update, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(command("tokenizer", photos, out, "--steps", "9"))
    assert checkpoint(out)["progress"]["done"] == 5
    assert signal.getsignal(number) is before
    monkeypatch.setattr(Update, "compute", compute)
    train.main(command("tokenizer", photos, out, "--steps", "9", "--resume"))
    train.main(command("tokenizer", photos, tmp_path / "whole", "--steps", "9"))
    row, expected = (last_row(folder / "tokenizer") for folder in (out, tmp_path / "whole"))
    assert row | {"seconds": 0} == expected | {"seconds": 0}  # also means over all nine steps


def spoil(monkeypatch, factor, *calls):
    """Multiplies the loss by something that is not finite in some calls."""
    forward, count = TokenizerStage.forward, [0]

    def spoilt(self, *arguments):
        step = forward(self, *arguments)
        count[0] += 1
        if count[0] in calls:
            step.loss = step.loss * factor
        return step

    monkeypatch.setattr(TokenizerStage, "forward", spoilt)


def test_a_step_that_is_not_finite_is_skipped(photos, tmp_path, monkeypatch):
    spoil(monkeypatch, float("inf"), 3, 5)
    train.main(command("tokenizer", photos, tmp_path, "--steps", "6"))
    row = last_row(tmp_path / "tokenizer")
    assert row["skipped"] == 2
    assert np.isfinite(row["loss"])
    assert np.isfinite(row["gradient_norm"])
    state = checkpoint(tmp_path)
    assert state["average"]["n_averaged"] == 5  # the start, and four steps
    assert state["rules"]["1.steps_0"] == 4
    assert all(value.isfinite().all() for value in state["trained"].values())


def test_ten_skipped_steps_in_a_row_end_the_training(photos, tmp_path, monkeypatch):
    spoil(monkeypatch, float("nan"), *range(2, 10), *range(11, 99))  # 8 of them, and then 10
    with pytest.raises(UserError, match=r"no longer finite at step 20; .* lower --learning-rate"):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "50"))


def test_a_learning_rate_that_is_much_too_high_ends_the_training(photos, tmp_path):
    with pytest.raises(UserError, match=r"no longer finite at step \d+; resume from .*checkpoint"):
        train.main(
            command("tokenizer", photos, tmp_path, "--steps", "50", "--learning-rate", "1e18")
        )


def test_parts_of_a_batch_train_as_the_batch(photos, tmp_path):
    """With code dropout, which leaves parts with different numbers of codes."""
    for parts in ("1", "4"):
        train.main([
            *command("tokenizer", photos, tmp_path / parts, "--steps", "10"),
            "--batch", "8", "--accumulate", parts,
        ])  # fmt: skip
    expected, actual = (checkpoint(tmp_path / parts) for parts in ("1", "4"))
    for name in ("trained", "average", "rules"):
        # Sums in another order differ by some 2**-24, and Adam divides by gradients of any size.
        assert_close(actual[name], expected[name], rtol=1e-5, atol=2e-6)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["tokenizer", "rap"])
def test_workers_change_nothing_not_even_in_mid_run(stage, photos, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    if stage == "rap":
        for earlier in ("tokenizer", "predictor"):
            train.main(command(earlier, photos, whole, "--steps", "1"))
        shutil.copytree(whole, split)
    more = ("--degradation", "second-order", "--estimator", "gumbel")
    train.main(command(stage, photos, whole, "--steps", "5", *more))
    train.main(command(stage, photos, split, "--steps", "3", "--workers", "2", *more))
    torch.manual_seed(123)
    train.main(command(stage, photos, split, "--steps", "5", "--resume", *more))
    expected = load_file(whole / f"{stage}.safetensors")
    assert_close(load_file(split / f"{stage}.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_low_precision_trains_weights_of_full_precision(preset, photos, tmp_path):
    for stage in ("tokenizer", "predictor", "rap"):
        more = ("--preset", preset, "--precision", "bfloat16", "--adversarial", "0.75")
        train.main(command(stage, photos, tmp_path, "--steps", "2", *more))
        row = last_row(tmp_path / stage)
        assert np.isfinite(row["loss"])
        assert row["skipped"] == 0
        state = checkpoint(tmp_path, stage)
        for name in ("trained", "average"):
            tensors = [v for v in state[name].values() if v.is_floating_point()]
            assert {v.dtype for v in tensors} == {torch.float32}


class TestPaper:
    """The recipe of the paper, with a little model."""

    @pytest.mark.full
    def test_three_stages(self, photos, tmp_path):
        for stage in ("tokenizer", "predictor", "rap"):
            more = ("--preset", "paper", "--crop", "64", "--steps", "2")
            train.main(command(stage, photos, tmp_path, *more))
            row = last_row(tmp_path / stage)
            assert ("adversarial" in row) == (stage != "predictor")
            assert ("code" in row) == (stage == "predictor")  # RAP of the paper keeps none
        assert {"alignment", "small", "codebook"} < last_row(tmp_path / "tokenizer").keys()
        state = checkpoint(tmp_path, "rap")
        assert state["run"]["--degradation"] == "second-order"
        assert "discriminator" in state
        model = load_super_resolver(tmp_path / "rap.safetensors")
        assert model(torch.rand(1, 3, 16, 16)).shape == (1, 3, 64, 64)

    def test_codes_learn_by_gradient_from_a_uniform_start(self, photos, tmp_path, monkeypatch):
        starts = []
        compute = Update.compute
        monkeypatch.setattr(
            Update,
            "compute",
            lambda self, *more: (
                starts.append(self.stage.trained.codes.clone()) or compute(self, *more)
            ),
        )
        more = ("--preset", "paper", "--adversarial", "0", "--steps", "2")
        train.main(command("tokenizer", photos, tmp_path, *more))
        assert 0.9 / 16 < starts[0].abs().max() <= 1 / 16
        assert not torch.equal(*starts)
        assert checkpoint(tmp_path)["rules"] == {}

    def test_images_are_compared_and_judged_in_the_range_of_the_paper(self):
        image, target = torch.rand(2, 1, 3, 8, 8)
        recipe = RECIPES["paper"]["tokenizer"]
        expected = torch.nn.functional.mse_loss(2 * image - 1, 2 * target - 1)
        assert_close(recipe.pixel(image, target), expected)
        critic = Critic(Ranks(), recipe)
        seen = []
        critic.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
        critic.generator_loss(torch.zeros(1, 3, 32, 32))
        critic.discriminator_loss(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32))
        assert [float(x.mean()) for x in seen] == [-1, 1, -1]

    def test_photos_smaller_than_the_crop_are_extended(self, photos, tmp_path):
        more = ("--preset", "paper", "--crop", "128", "--adversarial", "0", "--steps", "1")
        train.main(command("tokenizer", photos, tmp_path, *more))
        assert checkpoint(tmp_path)["progress"]["photos"][0] == 4


class TestInit:
    """A stage that starts from a file."""

    def test_each_stage_takes_what_it_needs(self, photos, tmp_path):
        for stage in ("tokenizer", "predictor"):
            train.main(command(stage, photos, tmp_path / "first", "--steps", "1"))
        start = tmp_path / "first" / "predictor.safetensors"
        # Nothing moves by so little, and an average starts from what it averages.
        more = ("--init", str(start), "--steps", "1", "--learning-rate", "1e-30")
        expected = load_file(start)
        for stage in ("predictor", "rap"):
            train.main(command(stage, photos, tmp_path / "second", *more))
            actual = load_file(tmp_path / "second" / f"{stage}.safetensors")
            assert_close(actual, expected, rtol=1e-6, atol=1e-7)
        train.main(command("tokenizer", photos, tmp_path / "second", *more))
        actual = load_file(tmp_path / "second" / "tokenizer.safetensors")
        name = "tokenizer.decoder.network.2.weight"
        assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)

    def test_rap_refuses_a_tokenizer(self, photos, tmp_path):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
        start = str(tmp_path / "tokenizer.safetensors")
        with pytest.raises(UserError, match="holds a tokenizer alone; --stage rap needs a pred"):
            train.main(command("rap", photos, tmp_path, "--steps", "1", "--init", start))

    def test_another_architecture(self, photos, tmp_path):
        train.main(command("tokenizer", photos, tmp_path, "--steps", "1"))
        more = ("--init", str(tmp_path / "tokenizer.safetensors"), "--preset", "paper")
        with pytest.raises(UserError, match="another architecture than --preset paper"):
            train.main(command("predictor", photos, tmp_path, "--steps", "1", *more))
