"""`unused_code_loss`: unused codes alone, each toward a valid token of its own."""

import pytest
import torch
from torch.testing import assert_close

from vqprior import Selection, VectorQuantizer
from vqprior.functional import unused_code_loss


def selection(inputs, indices, mask=None):
    mask = torch.ones(indices.shape, dtype=torch.bool) if mask is None else mask
    indices = torch.where(mask, indices, -1)
    return Selection(inputs=inputs, codes=inputs, indices=indices, mask=mask)


def test_by_hand():
    codes = torch.tensor([[0.0], [10.0], [20.0], [30.0]], requires_grad=True)
    inputs = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    loss = unused_code_loss(selection(inputs, torch.tensor([0, 0, 2, 0])), codes)
    # Code 1 has the second token as its target, code 3 the fourth.
    assert_close(loss, torch.tensor(((10.0 - 2) ** 2 + (30.0 - 4) ** 2) / 4))
    loss.backward()
    assert_close(codes.grad, torch.tensor([[0.0], [4.0], [0.0], [13.0]]))


def test_targets_are_spread_over_the_valid_tokens():
    """Fewer tokens than codes, some of them masked: as if these were not there."""
    codes = 100 + torch.randn(7, 2)
    inputs, indices = torch.randn(5, 2), torch.zeros(5, dtype=torch.int64)
    mask = torch.tensor([True, False, True, True, False])
    expected = unused_code_loss(selection(inputs[mask], indices[mask]), codes)
    targets = inputs[mask][torch.arange(7) * 3 // 7]
    assert_close(expected, (codes - targets)[1:].square().sum() / codes.numel())
    inputs[~mask] = torch.nan
    blank = torch.where(mask.unsqueeze(1), inputs, 0.0)
    assert_close(unused_code_loss(selection(blank, indices, mask), codes), expected)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 0)])
def test_without_valid_tokens_it_is_zero(shape):
    codes = torch.randn(4, 2, requires_grad=True)
    nothing = torch.zeros(shape, dtype=torch.bool)
    indices = torch.zeros(shape, dtype=torch.int64)
    loss = unused_code_loss(selection(torch.zeros(*shape, 2), indices, nothing), codes)
    loss.backward()
    assert_close(loss.detach(), torch.zeros(()))
    assert_close(codes.grad, torch.zeros(4, 2))


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_codes_far_from_the_data_come_into_use_by_gradient(weight):
    quantizer = VectorQuantizer(8, 64, unused_weight=weight)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(200):
        loss = quantizer(3 + 0.3 * torch.randn(256, 8)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    used = quantizer.encode(3 + 0.3 * torch.randn(2000, 8)).unique().numel()
    assert used > 32 if weight else used < 8


def test_wrong_arguments():
    out = VectorQuantizer(4, 8)(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"^`codes` must have shape \(k, d\) with k and d at"):
        unused_code_loss(out.selections[0], torch.zeros(4))
