"""Streaming means: the same as the mean over all images, however they arrive."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from vqprior.metrics import StreamingMean, _streaming_mean, gmsd, psnr, rgb_to_luma, ssim

every_score = pytest.mark.parametrize("score", [psnr, ssim, gmsd])


def pair(batch, height=20, width=24):
    target = torch.rand(batch, 3, height, width)
    return (target + 0.1 * torch.randn_like(target)).clamp(0, 1), target


@every_score
def test_is_the_mean_over_images_of_all_batches(score):
    metric, scores = StreamingMean(score), []
    for batch, width in ((3, 24), (1, 15), (2, 30)):
        x, y = pair(batch, width=width)
        metric.update(x, y)
        scores += score(x, y).tolist()
    assert_close(metric.compute(), sum(scores) / 6)
    assert metric.compute() == metric.compute()


@every_score
def test_reset_forgets_and_nothing_is_nan(score):
    metric = StreamingMean(score)
    assert math.isnan(metric.compute())
    metric.update(*pair(2))
    metric.reset()
    assert math.isnan(metric.compute())
    x, y = pair(1)
    metric.update(x, y)
    assert_close(metric.compute(), score(x, y).item())


@every_score
def test_the_range_is_a_unit(score):
    x, y = pair(2)
    metric, scaled = StreamingMean(score), StreamingMean(score, data_range=255.0)
    metric.update(x, y)
    scaled.update(255 * x, 255 * y)
    # Images are float32, and so are their multiples of 255.
    assert_close(metric.compute(), scaled.compute(), rtol=1e-5, atol=1e-6)


@every_score
def test_luma_and_border(score):
    x, y = pair(2)
    metric = StreamingMean(score, color="y", border=3)
    metric.update(x, y)
    cut = (rgb_to_luma(p[:, :, 3:17, 3:21]) for p in (x, y))
    assert_close(metric.compute(), score(*cut).mean().item())


@every_score
def test_luma_of_other_ranges(score):
    x, y = pair(2)
    metric = StreamingMean(score, color="y", data_range=255.0)
    metric.update(255 * x, 255 * y)
    expected = score(rgb_to_luma(x), rgb_to_luma(y)).mean().item()
    assert_close(metric.compute(), expected, rtol=1e-5, atol=1e-6)


@every_score
def test_sums_stay_exact_after_casts_and_in_checkpoints(score):
    metric, (x, y) = StreamingMean(score).half(), pair(2)
    metric.update(x, y)
    fresh = StreamingMean(score)
    fresh.load_state_dict(copy.deepcopy(metric.state_dict()), strict=True)
    assert fresh.total.dtype == torch.float64
    assert fresh.compute() == metric.compute()
    assert_close(fresh.compute(), score(x, y).mean().item())


@every_score
def test_no_graph_is_kept(score):
    metric, (x, y) = StreamingMean(score), pair(2)
    metric.update(x.requires_grad_(), y)
    assert not metric.total.requires_grad


@every_score
def test_ranks_are_added_without_changing_the_local_sums(score, monkeypatch):
    """Two ranks: ours, and one whose three images scored 12 together."""
    other = torch.tensor([12.0, 3.0], dtype=torch.float64)
    monkeypatch.setattr(_streaming_mean, "all_reduce_sum_", lambda sums: sums.add_(other))
    metric, (x, y) = StreamingMean(score), pair(2)
    metric.update(x, y)
    expected = (score(x, y).double().sum().item() + 12) / 5
    assert_close(metric.compute(), expected)
    assert_close(metric.compute(), expected)


@every_score
def test_rejects_pairs(score):
    x, y = pair(2)
    with pytest.raises(ValueError, match=r"`target` must have shape \(2, 3, 20, 24\), got \(1, 3"):
        StreamingMean(score).update(x, y[:1])
    with pytest.raises(TypeError, match=r"`reconstruction` must be a floating-point tensor, got"):
        StreamingMean(score).update(x.byte(), y.byte())
    with pytest.raises(TypeError, match=r"`target` must be a floating-point tensor, got"):
        StreamingMean(score).update(x, y.byte())
    with pytest.raises(ValueError, match=r"`reconstruction` must have shape \(b, "):
        StreamingMean(score).update(x[0], y[0])
    with pytest.raises(ValueError, match=r"`data_range` must be greater than 0, got -1\.0\."):
        StreamingMean(score, data_range=-1.0)


@every_score
def test_rejects_arguments(score):
    with pytest.raises(ValueError, match=r"`color` must be one of 'rgb', 'y', got 'ycbcr'\."):
        StreamingMean(score, color="ycbcr")
    with pytest.raises(ValueError, match=r"`border` must be at least 0, got -1\."):
        StreamingMean(score, border=-1)
    x, y = pair(1)
    with pytest.raises(ValueError, match=r"h and w at least 21, got \(1, 3, 20, 24\)\."):
        StreamingMean(score, border=10).update(x, y)
    with pytest.raises(ValueError, match=r"`reconstruction` must have shape \(b, 3, h, w\)"):
        StreamingMean(score, color="y").update(x[:, :1], y[:, :1])


def test_repr_shows_the_arguments():
    shown = "StreamingMean(psnr, color='y', data_range=1.0, border=4)"
    assert repr(StreamingMean(psnr, color="y", border=4)) == shown
    with pytest.raises(TypeError, match=r"^`score` must be callable, got str\."):
        StreamingMean("psnr")
