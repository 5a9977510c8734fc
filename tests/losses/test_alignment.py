"""alignment_loss against the mean written out."""

import pytest
import torch
from torch.testing import assert_close

from vqprior.losses import alignment_loss


def test_is_the_mean_square_with_a_gradient_to_the_features_only(dtype):
    features = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    target = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    loss = alignment_loss(features, target)
    wide = torch.promote_types(dtype, torch.float32)
    difference = features.detach().to(wide) - target.detach().to(wide)
    assert_close(loss.detach(), (difference**2).sum() / 120)
    loss.backward()
    assert_close(features.grad, (2 * difference / 120).to(dtype))
    assert target.grad is None


def test_masked_tokens_do_not_count_whatever_they_hold():
    features, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = sum(((features[i, j] - target[i, j]) ** 2).sum() for i, j in mask.nonzero()) / 12
    features[0, 1], target[1, 0] = torch.nan, torch.inf
    features.requires_grad_()
    loss = alignment_loss(features, target, mask)
    assert_close(loss, expected)
    loss.backward()
    assert features.grad.isfinite().all()
    assert_close(features.grad[~mask], torch.zeros(3, 4))


def test_no_counted_token_gives_zero():
    features = torch.randn(3, 4, requires_grad=True)
    loss = alignment_loss(features, torch.randn(3, 4), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert_close(loss, torch.tensor(0.0))
    assert_close(features.grad, torch.zeros(3, 4))


def test_rejects():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"`target` must have shape \(2, 3\), got \(3, 2\)\."):
        alignment_loss(x, x.T)
    with pytest.raises(ValueError, match=r"`mask` must have shape \(2,\), got \(3,\)\."):
        alignment_loss(x, x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"`mask` must be a boolean tensor"):
        alignment_loss(x, x, torch.ones(2))
