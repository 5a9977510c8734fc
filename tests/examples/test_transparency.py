"""Transparent images: alpha is upscaled beside colors that do not mix with hidden ones."""

import torch

from tests.examples.stand_in import StandIn
from tvqrap.images.files import Photo
from upscale import spread_color, upscale_photo


def test_alpha_is_upscaled_beside_the_colors():
    alpha = torch.zeros(1, 16, 16)
    alpha[:, :, 8:] = 1
    result = upscale_photo(StandIn().eval(), Photo(torch.rand(3, 16, 16), alpha))
    assert result.alpha.shape == (1, 64, 64)
    assert result.alpha[0, :, 20].max() == 0
    assert result.alpha[0, :, 43].min() == 255


def test_hidden_colors_do_not_bleed_into_visible_ones():
    alpha = torch.zeros(1, 32, 32)
    alpha[:, 8:24, 8:24] = 1
    rgb = alpha * torch.tensor([0.9, 0.6, 0.3])[:, None, None]  # and black where it is invisible
    filled = spread_color(rgb, alpha)
    assert torch.equal(filled[:, 8:24, 8:24], rgb[:, 8:24, 8:24])
    torch.testing.assert_close(filled[:, 4, 16], torch.tensor([0.9, 0.6, 0.3]))
    result = upscale_photo(StandIn().eval(), Photo(rgb, alpha))
    colors = result.rgb[:, result.alpha[0] > 100].int()  # the visible square and half its rim
    assert (colors.amax(dim=1) - colors.amin(dim=1)).max() < 30
