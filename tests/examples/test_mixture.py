import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.examples.degrading import photo
from tvqrap.degradations.blur_kernels import BellKernel, KernelChoice, SincKernel
from tvqrap.degradations.chances import Chances, draw_kernels, gaussians, resampling
from tvqrap.degradations.jpeg import jpeg
from tvqrap.degradations.mixture import Mixture, SecondOrderBatch, Share, reduce
from tvqrap.degradations.pipeline import MODES, Bicubic, SecondOrder


def crops(count, side=96):
    image = photo(height=256, width=256)
    rng = torch.Generator().manual_seed(0)
    corners = torch.randint(256 - side, (count, 2), generator=rng).tolist()
    return torch.cat([image[..., y : y + side, x : x + side] for y, x in corners])


@pytest.mark.parametrize(("number", "mode"), list(enumerate(MODES)))
@pytest.mark.parametrize(("before", "after"), [(40, 23), (31, 37), (12, 48), (25, 1), (40, 40)])
def test_resizes_as_torch_does(number, mode, before, after):
    canvas = torch.rand(2, 3, 40, 40)
    sizes = torch.tensor([before, 40]), torch.tensor([after, 7])
    matrix = resampling(*sizes, torch.full((2,), number), (48, 40))[:, None]
    resized = (matrix @ canvas @ matrix.transpose(-1, -2))[:1, :, :after, :after]
    expected = F.interpolate(canvas[:1, :, :before, :before], (after, after), mode=mode)
    # Sums of up to 1600 products in another order.
    assert_close(resized, expected, rtol=0, atol=1e-5)


def test_jpeg_of_many_qualities_is_that_of_each():
    images, qualities = torch.rand(3, 3, 30, 41), torch.tensor([30.0, 55.0, 90.0])
    each = [jpeg(p[None], q) for p, q in zip(images, qualities.tolist(), strict=True)]
    assert_close(jpeg(images, qualities), torch.cat(each), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", range(7))
def test_kernels_are_those_that_are_drawn_one_by_one(kind):
    # Of a range of one number there is one kernel, of some size.
    chosen = tuple(float(number == kind) for number in range(6))
    choice = KernelChoice((1.5, 1.5), (2.0, 2.0), (2.0, 2.0), float(kind == 6), chosen)
    chances = Chances(64, torch.Generator().manual_seed(0))
    kernels = draw_kernels(choice, chances)[:, 0]
    assert_close(kernels.sum((1, 2)), torch.ones(64))
    if kind in (0, 1):
        known = [BellKernel("iso", size, (1.5, 1.5)).weights() for size in range(7, 22, 2)]
        known = [F.pad(k, ((21 - len(k)) // 2,) * 4) for k in known]
        nearest = torch.stack([(kernels - k).abs().amax((1, 2)) for k in known]).amin(0)
        assert nearest.max() < 1e-6
    elif kind == 6:  # symmetric, and the highest cut-off is no blur
        assert_close(kernels, kernels.transpose(1, 2))
        assert (kernels < 0).any()


def test_sinc_kernels_are_those_of_the_pipeline(monkeypatch):
    chances = Chances(1, torch.Generator().manual_seed(0))
    choice = KernelChoice((1.0, 1.0), sinc_prob=2.0)
    monkeypatch.setattr(Chances, "below", lambda self, end: torch.tensor([end - 1]))
    monkeypatch.setattr(Chances, "uniform", lambda self, low=0.0, high=1.0: torch.tensor([1.7]) / 2)
    kernel = draw_kernels(choice, chances)[0, 0]
    assert_close(kernel, SincKernel(21, 0.85).weights(), rtol=0, atol=1e-6)


def test_no_blur_changes_nothing():
    kernel = gaussians(torch.zeros(1), 9)[0, 0]
    assert kernel[4, 4] == 1
    assert kernel.sum() == 1


def test_clean_is_the_bicubic_degradation():
    hr = crops(2)
    assert_close(reduce(hr), Bicubic()(hr, [0, 1]), rtol=0, atol=0)


def test_shares_are_right_in_the_long_run():
    share = Share(0.18)
    assert sum(share.of(3) for _ in range(100)) == 54


def test_mixes_three_kinds():
    hr = crops(20)
    generator = torch.Generator().manual_seed(0)
    lr = Mixture(mild=0.5, severe=0.25)(hr, generator)
    assert lr.shape == (20, 3, 24, 24)
    assert_close((255 * lr).round() / 255, lr)
    clean = (lr == reduce(hr)).flatten(1).all(1)
    # Of ten a little spoilt ones about one has no blur, no noise and no compression.
    assert 5 <= clean.sum() <= 8


@pytest.mark.full
def test_degrades_as_the_pipeline_does_one_by_one():
    hr = crops(160)
    clean = reduce(hr)
    one_by_one = SecondOrder()(hr, range(160))
    together = SecondOrderBatch()(hr, torch.Generator().manual_seed(1)).clamp(0, 1)
    for measure in (
        lambda lr: (lr - clean).square().mean((1, 2, 3)).sqrt(),
        lambda lr: lr.diff(dim=-1).abs().mean((1, 2, 3)).log(),
        lambda lr: (lr[:, 0] - lr[:, 1]).std((1, 2)),
    ):
        first, second = measure(one_by_one), measure(together)
        error = (first.var() / 160 + second.var() / 160).sqrt()
        assert (first.mean() - second.mean()).abs() < 4 * error
