"""Images for tests of degradations."""

import math

import numpy as np
import torch
from PIL import Image

from tests.examples.conftest import EXAMPLE
from tvqrap.degradations.pipeline import Scene

PHOTOS = EXAMPLE / "photos"


def photo(name="coffee.png", height=256, width=256, top=100, left=200):
    levels = np.array(Image.open(PHOTOS / name).convert("RGB"))
    levels = levels[top : top + height, left : left + width]
    return torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255


def to_pillow(image):
    return Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def psnr(a, b):
    return -10 * math.log10((a - b).square().mean().item())


def scene(image, seed=0):
    return Scene(tuple(image.shape[-2:]), torch.Generator().manual_seed(seed))


def assert_occurs(happened, prob):
    """How often something happened is within 4 standard errors of what is expected."""
    happened = list(happened)
    error = math.sqrt(prob * (1 - prob) / len(happened))
    assert abs(np.mean(happened) - prob) < 4 * error
