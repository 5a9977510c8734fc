"""The simulation of JPEG, against what Pillow writes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.examples.degrading import from_pillow, photo, psnr, to_pillow
from tvqrap.degradations.jpeg import CHROMA_STEPS, LUMA_STEPS, Jpeg, jpeg, scaled_steps


@pytest.fixture(scope="module")
def crops():
    return torch.cat([photo(height=64, width=64, left=64 * i) for i in range(8)])


def compressed(image, quality):
    """The file that Pillow writes, decoded."""
    file = io.BytesIO()
    to_pillow(image).save(file, "JPEG", quality=quality, subsampling=2)
    return Image.open(file)


@pytest.mark.parametrize("quality", [1, 10, 30, 49, 50, 51, 75, 94, 95, 100])
def test_quantization_steps_are_those_of_libjpeg(quality):
    luma, chroma = compressed(photo(height=16, width=16), quality).quantization.values()
    assert scaled_steps(LUMA_STEPS, quality).flatten().tolist() == luma
    assert scaled_steps(CHROMA_STEPS, quality).flatten().tolist() == chroma


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png"])
@pytest.mark.parametrize("quality", [10, 30, 60, 95])
def test_jpeg_looks_as_what_pillow_writes(name, quality):
    original = photo(name, height=251, width=203, top=40, left=60)  # no multiples of 16
    ours = (jpeg(original, quality) * 255).round() / 255
    theirs = from_pillow(compressed(original, quality))
    assert psnr(ours, theirs) > 41  # measured: 43 to 48; with repeated chroma pixels 40 to 41
    assert psnr(ours, theirs) > psnr(theirs, original) + 5
    assert psnr(ours, original) == pytest.approx(psnr(theirs, original), abs=0.4)


def test_a_higher_quality_is_closer_to_the_original():
    original = photo()
    ratios = [psnr(jpeg(original, quality), original) for quality in (5, 20, 40, 60.5, 80, 92, 98)]
    assert ratios == sorted(ratios)
    assert min(np.diff(ratios)) > 0.5


def test_jpeg_leaves_gray_gray_and_takes_what_a_resize_overshot():
    gray = photo().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    result = jpeg(gray, 40)
    assert (result - result[:, :1]).abs().max() < 1e-5
    flat = torch.full((1, 3, 20, 20), 0.5)
    assert (jpeg(flat, 90) - flat).abs().max() < 2 / 255
    wild = photo() * 1.5 - 0.2
    assert torch.equal(Jpeg(50)(wild), jpeg(wild.clamp(0, 1), 50))


def test_every_image_of_a_batch_is_compressed_as_alone(crops):
    together = jpeg(crops, 50)
    apart = torch.cat([jpeg(crop[None], 50) for crop in crops])
    assert psnr(together, apart + 1e-9) > 60


@pytest.mark.parametrize("quality", [0, 0.5, 100.5, -3])
def test_impossible_qualities_are_errors(quality):
    with pytest.raises(ValueError, match=r"`quality` must be in \[1, 100\], got"):
        jpeg(torch.zeros(1, 3, 16, 16), quality)
