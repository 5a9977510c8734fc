"""Constants: right wherever a module is built, moved or called, and never a buffer."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.contracts.layouts import exactly
from vqprior import FSQ
from vqprior._precision import without_autocast

X = torch.tensor([[0.4, -0.9], [-3.0, 0.1]])
LEVELS = torch.tensor([4, 7])


def on(device):
    with torch.device(device):
        return FSQ([4, 7])


@pytest.mark.parametrize("built_on", ["cpu", "meta"])
def test_constants_have_values_wherever_they_are_built(built_on):
    fsq = on(built_on)
    exactly(fsq.levels, LEVELS)
    assert not list(fsq.buffers())
    for twin in (fsq.to("meta"), copy.deepcopy(fsq), pickle.loads(pickle.dumps(fsq))):
        exactly(twin.levels, LEVELS)
        exactly(twin.half().to(torch.float64).levels, LEVELS)
        exactly(twin.encode(X), FSQ([4, 7]).encode(X))


def test_a_module_built_or_moved_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        fsq = FSQ([4, 7])
        nn.Sequential(fsq).to(torch.float64)
    assert not fsq.levels.is_inference()
    x = X.clone().requires_grad_()
    fsq(x).quantized.sum().backward()
    assert x.grad.any()


def moved_behind_its_back(device):
    """As ``load_state_dict(assign=True)`` leaves it: the constants stay where they were built."""
    fsq = FSQ([4, 7])
    fsq.levels = fsq.levels.to(device)
    return fsq


@pytest.mark.gpu
def test_constants_follow_the_input_and_stay_there():
    fsq = moved_behind_its_back("cpu")
    with torch.inference_mode():
        exactly(fsq.encode(X.cuda()).cpu(), FSQ([4, 7]).encode(X))
    kept = fsq.levels
    assert kept.is_cuda
    assert not kept.is_inference()
    fsq(X.cuda().requires_grad_()).quantized.sum().backward()
    assert fsq.levels is kept


@pytest.mark.gpu
def test_a_transform_leaves_nothing_behind():
    fsq = moved_behind_its_back("cpu")
    torch.func.grad(lambda x: fsq._constant("levels", x.device).float().sum() * x)(X[0, 0].cuda())
    exactly(fsq.encode(X.cuda()).cpu(), FSQ([4, 7]).encode(X))


@pytest.mark.gpu
def test_constants_are_built_where_parameters_are():
    assert on("cuda").levels.is_cuda
    assert on("cpu").cuda().levels.is_cuda
    exactly(on("meta").to_empty(device="cuda").levels.cpu(), LEVELS)


def test_an_input_without_values_does_not_take_them_away():
    fsq = FSQ([4, 7])
    assert fsq(X.to("meta")).indices.is_meta
    exactly(fsq.levels, LEVELS)


def test_autocast_is_off_inside_of_the_context():
    a = torch.ones(2, 2)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with without_autocast("cpu"):
                assert (a @ a).dtype == torch.float32
            assert (a @ a).dtype == (torch.bfloat16 if enabled else torch.float32)
    with without_autocast("meta"):
        assert (a.to("meta") @ a.to("meta")).is_meta
