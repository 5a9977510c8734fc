"""AdversarialLoss: who receives which gradient, and what stays untouched."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from vqprior.losses import AdversarialLoss, HingeGAN, LeastSquaresGAN
from vqprior.nn import PatchDiscriminator


def make(*objective):
    return AdversarialLoss(PatchDiscriminator(width=4, num_layers=2), *objective)


def images():
    return torch.rand(2, 3, 16, 20, requires_grad=True), torch.rand(2, 3, 16, 20)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_generator_loss_is_that_of_the_plain_discriminator(training):
    loss, (fake, _) = make(LeastSquaresGAN()).train(training), images()
    plain = copy.deepcopy(loss.discriminator)
    value = loss(fake)
    expected = ((plain(fake) - 1) ** 2).mean() / 2
    assert_close(value, expected)
    assert_close(*(torch.autograd.grad(v, fake)[0] for v in (value, expected)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_generator_loss_leaves_the_discriminator_alone(training):
    loss, (fake, _) = make().train(training), images()
    before = copy.deepcopy(loss.state_dict())
    loss(fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in loss.parameters())
    assert_close(dict(loss.state_dict()), dict(before), rtol=0, atol=0)


def test_generator_loss_keeps_gradients_already_collected():
    loss, (fake, real) = make(), images()
    loss.discriminator_loss(fake, real).backward()
    collected = [p.grad.clone() for p in loss.parameters()]
    loss(fake).backward()
    for parameter, gradient in zip(loss.parameters(), collected, strict=True):
        assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_discriminator_loss_trains_the_discriminator_only():
    loss, (fake, real) = make(), images()
    real.requires_grad_()
    plain = copy.deepcopy(loss.discriminator)
    value = loss.discriminator_loss(fake, real)
    on_real, on_fake = plain(real), plain(fake)
    expected = ((1 - on_real).clamp_min(0).mean() + (1 + on_fake).clamp_min(0).mean()) / 2
    assert_close(value, expected)
    value.backward()
    expected.backward()
    for ours, theirs in zip(loss.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
    fake_gradient = fake.grad.clone()
    fake.grad = real.grad = None
    loss.discriminator_loss(fake, real).backward()
    assert fake.grad is None
    assert real.grad is None
    assert fake_gradient.abs().sum() > 0  # so the plain loss would have reached it


def test_default_objective_is_the_hinge():
    discriminator = PatchDiscriminator(width=4)
    assert AdversarialLoss(discriminator).objective == HingeGAN()
    assert "objective=HingeGAN()" in repr(AdversarialLoss(discriminator))


def test_state_is_that_of_the_discriminator():
    loss = make()
    names = {f"discriminator.{name}" for name in loss.discriminator.state_dict()}
    assert set(loss.state_dict()) == names


@pytest.mark.full
def test_compiles_without_graph_break():
    loss, (fake, _) = make(), images()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(compiled(fake), loss(fake))
    before = copy.deepcopy(loss.state_dict())
    compiled(fake).backward()
    assert_close(dict(loss.state_dict()), dict(before), rtol=0, atol=0)
    assert all(p.grad is None for p in loss.parameters())


@pytest.mark.full
def test_goes_past_the_wrapper_of_a_distributed_discriminator(tmp_path):
    plain, (fake, real) = make(), images()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain.discriminator))
        loss, calls = AdversarialLoss(wrapped), []
        wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
        for _ in range(2):
            assert_close(loss(fake), plain(fake))
            loss(fake).backward()
            assert not calls
            loss.discriminator_loss(fake, real).backward()
            plain.discriminator_loss(fake, real).backward()
            assert len(calls) == 2
            calls.clear()
        for ours, theirs in zip(loss.parameters(), plain.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad)
    finally:
        dist.destroy_process_group()
