import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tvqrap.cli import UserError
from tvqrap.degradations.mixture import Mixture, reduce
from tvqrap.training.memory import Copies, PhotoMemory, crop_pairs

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Two photos whose every pixel is another one."""
    for number, (height, width) in enumerate([(100, 130), (96, 96)]):
        places = np.arange(height * width).reshape(height, width)
        colors = np.stack([places % 256, places // 256, np.full_like(places, number)], axis=-1)
        Image.fromarray(colors.astype(np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_crops_are_parts_of_photos_turned_in_eight_ways(folder):
    memory = PhotoMemory([folder], smallest=96, device=CPU, copies=Copies(factors=(1.0,)))
    crops = memory.crops(200, 96, torch.Generator().manual_seed(0)).long()
    widths = torch.tensor([130, 96])[crops[:, 2, 0, 0]]
    places = crops[:, 0] + 256 * crops[:, 1]
    steps = {
        (int(place[1, 0] - place[0, 0]) / width, int(place[0, 1] - place[0, 0]) / width)
        for place, width in zip(places, widths.tolist(), strict=True)
    }
    # A step down is a row and a step to the right a column, or the other way round.
    assert {max(abs(down), abs(right)) for down, right in steps} == {1.0}
    assert (
        len({(np.sign(down), np.sign(right), abs(down) > abs(right)) for down, right in steps}) == 8
    )
    corners = places.amin((1, 2))
    rows, columns = corners // widths, corners % widths
    wide = widths == 130
    assert rows[wide].unique().tolist() == list(range(5))
    assert columns[wide].max() > 25


def test_small_photos_and_copies_are_left_out(folder):
    copies = Copies(factors=(1.0, 0.97))
    assert len(PhotoMemory([folder], smallest=96, device=CPU, copies=copies).sizes) == 3
    assert PhotoMemory([folder], smallest=98, device=CPU, copies=copies).photos == 1
    with pytest.raises(UserError, match="smaller than 101 pixels"):
        PhotoMemory([folder], smallest=101, device=CPU)


def test_pairs_are_cut_so_that_borders_are_no_borders(folder):
    memory = PhotoMemory([folder], smallest=96, device=CPU)
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    pairs = crop_pairs(memory, Mixture(0.0, 0.0), batch=2, crop=64, generator=draws[0], ahead=2)
    around = memory.detailed_crops(4, 96, draws[1]).float() / 255
    hr, lr = (torch.cat(parts) for parts in zip(next(pairs), next(pairs), strict=True))
    assert_close(hr, around[..., 16:80, 16:80], rtol=0, atol=0)
    assert_close(lr, reduce(around)[..., 4:20, 4:20], rtol=0, atol=0)


def test_detail_is_preferred(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    for name, levels in (("flat", np.full_like(noise, 90)), ("noise", noise)):
        Image.fromarray(levels).save(tmp_path / f"{name}.png")
    memory = PhotoMemory([tmp_path], smallest=96, device=CPU)
    crops = memory.detailed_crops(1000, 32, torch.Generator().manual_seed(0))
    detailed = (crops.float().std((1, 2, 3)) > 0).float().mean()
    # Both of two are flat in a quarter of the cases; in half of them one is, and is taken in a
    # quarter of those: 5/8 is left, with a standard error of 0.015.
    assert abs(detailed - 0.625) < 0.06
