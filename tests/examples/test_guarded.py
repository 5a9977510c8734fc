import torch
from torch import nn
from torch.testing import assert_close

from tvqrap.training.guarded import LIMIT, GuardedAdam, WeightAverage


def stepped(guarded, parameter, gradient):
    parameter.grad = torch.tensor(gradient)
    return guarded.step(0.1)


def test_leaves_out_gradients_that_are_not_finite():
    parameter, free = (nn.Parameter(torch.ones(2)) for _ in range(2))
    guarded = GuardedAdam([parameter], (0.9, 0.99))
    plain = torch.optim.Adam([free], lr=0.1, betas=(0.9, 0.99))
    for gradient in ([1.0, 2.0], [torch.nan, 1.0], [torch.inf, 0.0], [-1.0, 1.0]):
        _, bad = stepped(guarded, parameter, gradient)
        assert bool(bad) == (not torch.tensor(gradient).isfinite().all())
        if not bad:
            free.grad = torch.tensor(gradient)
            plain.step()
    assert_close(parameter, free)


def test_shortens_gradients_that_are_far_too_long():
    parameter, free = (nn.Parameter(torch.ones(2)) for _ in range(2))
    guarded = GuardedAdam([parameter], (0.9, 0.99))
    plain = torch.optim.Adam([free], lr=0.1, betas=(0.9, 0.99))
    stepped(guarded, parameter, [3.0, 4.0])
    norm, _ = stepped(guarded, parameter, [300.0, 400.0])
    assert_close(norm, torch.tensor(500.0))
    for gradient in ([3.0, 4.0], [3.0 * LIMIT, 4.0 * LIMIT]):
        free.grad = torch.tensor(gradient)
        plain.step()
    assert_close(parameter, free)


def test_averages_weights_and_buffers_that_float():
    module = nn.BatchNorm2d(1)
    average = WeightAverage(module, 0.5)
    with torch.no_grad():
        for value in (2.0, 4.0):
            module.weight.fill_(value)
            module.running_mean.fill_(value)
            average.update()
    # Of the first, 2/11 of the start are kept; of the second a quarter (3/12).
    expected = [[(1.0 * 2 + 9 * 2.0) / 11], [9 * 2.0 / 11]]
    expected = [[0.25 * value + 0.75 * 4.0 for value in values] for values in expected]
    assert_close(average.module.weight, torch.tensor(expected[0]), check_dtype=True)
    assert_close(average.module.running_mean, torch.tensor(expected[1]))
    assert not average.module.weight.requires_grad
