"""Tiles give what the whole picture gives, leave no seams, and stay within bounds."""

import pytest
import torch
from cli import UserError
from tiling import BLEND, upscale_tiled

from tests.examples.stand_in import StandIn


@pytest.fixture
def model():
    return StandIn().eval()


@pytest.mark.parametrize(
    "size", [(8, 8), (1, 1), (1, 70), (70, 1), (8, 200), (33, 65), (32, 64), (100, 131), (31, 257)]
)
def test_tiles_equal_the_whole_for_a_local_model(model, size):
    lr = torch.rand(3, *size)
    tiled = upscale_tiled(model, lr, tile=32, dtype=torch.uint16)
    with torch.no_grad():
        whole = model(lr[None])[0].clamp(0, 1)
    assert tiled.dtype == torch.uint16
    assert tiled.shape == (3, 4 * size[0], 4 * size[1])
    torch.testing.assert_close(tiled.float() / 65535, whole, rtol=0, atol=1.6 / 65535)


def test_too_little_overlap_would_show_in_this_test(model):
    lr = torch.rand(3, 64, 64)
    whole = upscale_tiled(model, lr, tile=64, dtype=torch.uint16)
    model.overlap = 0
    tiled = upscale_tiled(model, lr, tile=32, dtype=torch.uint16)
    assert (tiled.float() - whole.float()).abs().max() > 20


def test_levels_are_rounded_to_the_nearest(model):
    lr = torch.rand(3, 40, 40)
    eight = upscale_tiled(model, lr, tile=32)
    with torch.no_grad():
        whole = model(lr[None])[0].clamp(0, 1)
    assert eight.dtype == torch.uint8
    torch.testing.assert_close(eight.float(), whole * 255, rtol=0, atol=0.502)


def test_tiles_that_disagree_meet_in_a_ramp_and_not_in_an_edge():
    tiles = StandIn(jump=0.02).eval()  # every tile is brighter than the one before
    lr = torch.full((3, 96, 96), 0.4)
    result = upscale_tiled(tiles, lr, tile=32, dtype=torch.uint16).float() / 65535
    assert len(tiles.calls) == 9
    down, right = result.diff(dim=1).abs(), result.diff(dim=2).abs()
    ramp = 2 * BLEND * 4
    assert result.max() - result.min() > 0.15
    assert right.max() <= 0.02 / ramp * 1.05 + 2e-5  # one tile's difference, spread over the ramp
    assert down.max() <= 0.06 / ramp * 1.05 + 2e-5  # three tiles later


def test_tiles_begin_where_the_model_wants_them_to(model):
    class Grid(StandIn):
        multiple = 8
        overlap = 9

        def forward(self, lr):  # every block of 8 pixels becomes its mean
            self.calls.append(tuple(lr.shape))
            height, width = lr.shape[-2:]
            padded = torch.nn.functional.pad(lr, (0, -width % 8, 0, -height % 8), mode="replicate")
            means = torch.nn.functional.avg_pool2d(padded, 8)
            return means.repeat_interleave(32, -1).repeat_interleave(32, -2)[
                ..., : 4 * height, : 4 * width
            ]

    grid, lr = Grid().eval(), torch.rand(3, 77, 90)
    tiled = upscale_tiled(grid, lr, tile=32)
    assert len(grid.calls) > 4
    torch.testing.assert_close(tiled, upscale_tiled(grid, lr, tile=1000), rtol=0, atol=1)


def test_no_tile_is_larger_than_asked_for(model):
    upscale_tiled(model, torch.rand(3, 150, 330), tile=64)
    largest = 64 + model.multiple + 2 * (BLEND + model.overlap + model.multiple)
    assert len(model.calls) == 3 * 6
    assert all(max(shape[-2:]) <= largest for shape in model.calls)


def test_a_small_picture_is_one_tile(model):
    upscale_tiled(model, torch.rand(3, 50, 64), tile=64)
    assert model.calls == [(1, 3, 50, 64)]


def test_progress_counts_every_tile(model):
    seen = []
    upscale_tiled(model, torch.rand(3, 70, 40), tile=32, progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_no_memory_is_the_users_to_solve(model):
    def forward(lr):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    model.forward = forward
    with pytest.raises(UserError, match=r"tile of 40x9 pixels; pass a smaller --tile$"):
        upscale_tiled(model, torch.rand(3, 9, 40), tile=64)


def test_other_failures_of_the_model_are_bugs(model):
    with pytest.raises(RuntimeError, match="channels"):
        upscale_tiled(model, torch.rand(5, 9, 40), tile=64)
