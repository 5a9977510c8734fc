"""Comparisons: what they show of images of any size."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.examples.stand_in import StandIn
from tvqrap.images import panels
from tvqrap.images.files import Photo, preview
from tvqrap.images.levels import from_pillow, to_float
from tvqrap.images.panels import comparison, find_detail, upscale_by
from upscale import upscale_photo


def test_detail_is_where_the_contrast_is():
    image = Image.new("L", (100, 80), 128)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    image.paste(Image.fromarray(noise), (70, 10))
    left, top, right, bottom = find_detail(image, 24)
    assert left <= 70
    assert top <= 10
    assert right >= 90
    assert bottom >= 30
    assert (right - left, bottom - top) == (24, 24)
    assert find_detail(image.crop((0, 0, 9, 8)), 24) == (0, 0, 9, 8)


@pytest.mark.parametrize("size", [(8, 8), (60, 60), (150, 90), (400, 8), (8, 400)])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_comparison_is_drawn_for_any_size(size, alpha):
    width, height = size
    photo = Photo(
        torch.rand(3, height, width),
        None if alpha is None else torch.full((1, height, width), alpha),
    )
    sheet = comparison(photo, upscale_photo(StandIn().eval(), photo))
    assert sheet.mode == "RGB"
    assert 200 < sheet.width < 1400
    assert sheet.height < 1400


def test_bicubic_is_on_the_left():
    photo = Photo(torch.full((3, 100, 100), 0.2))
    white = Photo(torch.ones(3, 400, 400))
    sheet = np.array(comparison(photo, white))
    assert sheet[200, 60].tolist() == [51] * 3
    assert sheet[200, 10 + 400 + 60].tolist() == [255] * 3


def test_the_detail_is_that_of_the_whole_upscaled_image(monkeypatch):
    shown = []
    monkeypatch.setattr(panels, "contact_sheet", shown.append)
    photo = Photo(torch.rand(3, 200, 300))
    large = upscale_by(preview(photo), 4)
    comparison(photo, Photo(to_float(from_pillow(large))))
    (_, whole), (_, result) = shown[0][0]
    assert np.abs(np.array(whole, int) - np.array(result, int)).mean() < 4  # other filters
    (_, bicubic), (_, model) = shown[0][1]
    assert (np.array(bicubic) == np.array(model)).all()
