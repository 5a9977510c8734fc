"""`select_codes` by kernels: the same as by operators, and what it leaves to them.

`test_triton_choice.py` runs this file, as it runs `triton_choice_cases.py`.
"""

import pytest
import torch
from torch.testing import assert_close

from tests.contracts.observers import NoHostSync
from tests.functional.triton_cases import DEVICE, LOW, exactly
from tests.functional.triton_choice_cases import by_definition, problem
from vqprior.functional import select_codes
from vqprior.functional._kernels import (
    _triton,
    _triton_choice,
    _triton_choice_gradient,
    _triton_layout,
)


@pytest.fixture
def kernels(monkeypatch):
    """Makes `select_codes` take the kernels, on the CPU too; the calls they get."""

    class Calls(list):
        dtypes = ()

    calls = Calls()
    for module, name in [(_triton_choice, "choose"), (_triton_choice_gradient, "gradient")]:
        kernel = getattr(module, name)

        def watched(*arguments, kernel=kernel):
            calls.append(kernel.__name__)
            tensors = (one for one in arguments if isinstance(one, torch.Tensor))
            calls.dtypes += tuple(one.dtype for one in tensors if one.is_floating_point())
            return kernel(*arguments)

        monkeypatch.setattr(module, name, watched)
    narrow = {torch.float16, torch.bfloat16, torch.float32, torch.int64}
    monkeypatch.setattr(
        _triton, "is_usable", lambda *tensors: all(one.dtype in narrow for one in tensors)
    )
    return calls


def step(logits, codes, weight, estimator, **options):
    logits, codes = logits.detach().requires_grad_(), codes.detach().requires_grad_()
    torch.manual_seed(0)
    vectors, indices = select_codes(logits, codes, estimator=estimator, **options)
    return (
        vectors.detach(),
        indices,
        *torch.autograd.grad((weight * vectors).sum(), (logits, codes)),
    )


@pytest.mark.parametrize("leading", [(), (7,), (2, 0, 3), (3, 5)], ids=str)
@pytest.mark.parametrize(
    ("estimator", "used"),
    [
        ("straight_through", ["choose", "gradient"]),
        ("gumbel", ["choose", "gradient"]),
        ("soft", ["gradient"]),
        ("reinmax", ["choose"]),
    ],
)
def test_selection_by_kernels_is_the_one_by_operators(
    kernels, monkeypatch, estimator, used, leading
):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*leading, 20), (20, 6), (*leading, 6))
    tensors = [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]
    with_kernels = step(*tensors, estimator, temperature=0.7)
    assert kernels == used
    monkeypatch.setattr(_triton, "is_usable", lambda *_: False)
    by_operators = step(*tensors, estimator, temperature=0.7)
    assert kernels == used
    exactly(with_kernels[1], by_operators[1].cpu())
    if estimator != "soft":
        exactly(with_kernels[0], by_operators[0].cpu())
    assert_close(with_kernels, by_operators, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_selected_without_a_copy_of_the_logits(kernels, dtype):
    tensors = [tensor.to(DEVICE) for tensor in problem(50, 40, 6, dtype)]
    _, indices, of_logits, _ = step(*tensors, "straight_through")
    assert kernels == ["choose", "gradient"]
    assert all(dtype == taken for taken in kernels.dtypes)
    exactly(indices, tensors[0].argmax(dim=-1).cpu())
    assert of_logits.dtype == dtype


def test_float64_and_second_derivatives_are_left_to_operators(kernels):
    wide = [tensor.double().to(DEVICE) for tensor in problem(5, 8, 3)]
    step(*wide, "straight_through")
    assert not kernels
    logits, codes, weight = (tensor.to(DEVICE) for tensor in problem(5, 8, 3))
    logits.requires_grad_()
    vectors, _ = select_codes(logits, codes)
    (first,) = torch.autograd.grad((weight * vectors).sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    assert kernels == ["choose"]
    assert second.abs().sum() > 0


def test_transforms_see_operators(kernels):
    logits, codes, weight = (tensor.to(DEVICE) for tensor in problem(5, 8, 3))

    def loss(row, direction):
        return (direction * select_codes(row, codes)[0]).sum()

    found = torch.func.vmap(torch.func.grad(loss))(logits, weight)
    assert not kernels
    expected = by_definition(weight.cpu(), logits.cpu(), codes.cpu(), 1.0)
    assert_close(found.cpu(), expected.float(), rtol=1e-4, atol=1e-5)


def test_the_result_may_be_changed_in_place(kernels):
    logits, codes, weight = (tensor.to(DEVICE) for tensor in problem(5, 8, 3))
    before = codes.clone()
    leaf = logits.requires_grad_()
    vectors, _ = select_codes(leaf, codes)
    (vectors.mul_(2) * weight).sum().backward()
    exactly(codes, before.cpu())
    expected = by_definition(2 * weight.cpu(), logits.detach().cpu(), codes.cpu(), 1.0)
    assert_close(leaf.grad.cpu(), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_step_launches_four_kernels_and_never_waits(kernels, monkeypatch):
    launched = []
    modules = (_triton_choice, "_choose"), (_triton_layout, "_lay_out")
    passes = ((_triton_choice_gradient, name) for name in ("_weigh", "_spread"))
    for module, name in (*modules, *passes):
        kernel = getattr(module, name)

        class Watched:
            def __getitem__(self, grid, kernel=kernel, name=name):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Watched())
    logits, codes, weight = (tensor.to(DEVICE) for tensor in problem(20, 40, 6))
    with NoHostSync():
        step(logits, codes, weight, "straight_through")
    assert launched == ["_choose", "_lay_out", "_weigh", "_spread"]
