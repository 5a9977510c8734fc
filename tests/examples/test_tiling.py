"""Tiles give what the whole image gives, leave no seams, and stay within bounds."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.examples.stand_in import StandIn
from tvqrap.cli import UserError
from tvqrap.images.layouts import Averaged, Blended, Tiling, seen_share
from tvqrap.images.tiling import upscale_tiled

PARITY = Path(__file__).parents[1] / "fixtures" / "parity" / "tiling.npz"


@pytest.fixture
def model():
    return StandIn().eval()


@pytest.mark.parametrize(
    "size", [(8, 8), (1, 1), (1, 70), (70, 1), (8, 200), (33, 65), (32, 64), (100, 131), (31, 257)]
)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_tiles_equal_the_whole_for_a_local_model(model, size, batch):
    lr = torch.rand(3, *size)
    tiled = upscale_tiled(model, lr, Blended(32), batch=batch, dtype=torch.uint16)
    with torch.no_grad():
        whole = model(lr[None])[0].clamp(0, 1)
    assert tiled.dtype == torch.uint16
    assert tiled.shape == (3, 4 * size[0], 4 * size[1])
    torch.testing.assert_close(tiled.float() / 65535, whole, rtol=0, atol=1.6 / 65535)


def test_too_little_overlap_would_show_in_this_test(model):
    lr = torch.rand(3, 64, 64)
    whole = upscale_tiled(model, lr, Blended(64), dtype=torch.uint16)
    model.tiling = replace(model.tiling, overlap=0)
    tiled = upscale_tiled(model, lr, Blended(32), dtype=torch.uint16)
    assert (tiled.float() - whole.float()).abs().max() > 20


def test_levels_are_rounded_to_the_nearest(model):
    lr = torch.rand(3, 40, 40)
    eight = upscale_tiled(model, lr, Blended(32))
    with torch.no_grad():
        whole = model(lr[None])[0].clamp(0, 1)
    assert eight.dtype == torch.uint8
    torch.testing.assert_close(eight.float(), whole * 255, rtol=0, atol=0.502)


def test_tiles_that_disagree_meet_in_a_ramp_and_not_in_an_edge():
    tiles = StandIn(jump=0.02).eval()  # every tile is brighter than the one before
    lr = torch.full((3, 96, 96), 0.4)
    result = upscale_tiled(tiles, lr, Blended(32), dtype=torch.uint16).float() / 65535
    assert len(tiles.calls) == 9
    down, right = result.diff(dim=1).abs(), result.diff(dim=2).abs()
    ramp = 2 * tiles.tiling.blend * 4
    assert result.max() - result.min() > 0.15
    assert right.max() <= 0.02 / ramp * 1.05 + 2e-5  # one tile's difference, spread over the ramp
    assert down.max() <= 0.06 / ramp * 1.05 + 2e-5  # three tiles later


class Tilting(StandIn):
    """Every tile has a brightness and a slope of its own."""

    def forward(self, lr):
        self.calls.append(tuple(lr.shape))
        generator = torch.Generator().manual_seed(len(self.calls))
        level, down, right = (torch.rand(3, generator=generator) - 0.5).mul(0.1).tolist()
        tile = F.interpolate(lr, scale_factor=4, mode="nearest")
        y, x = (torch.linspace(-1, 1, side) for side in tile.shape[-2:])
        return tile + level + down * y[:, None] + right * x


def test_seams_are_an_order_of_magnitude_fainter_than_the_authors():
    jumps, counts = {}, {}
    overlap = 2 * (Tilting.tiling.overlap + Tilting.tiling.blend)
    for layout in (Blended(64 - overlap), Averaged(64, 64 - overlap)):
        tiles = Tilting().eval()
        result = upscale_tiled(tiles, torch.full((3, 160, 208), 0.5), layout, dtype=torch.uint16)
        both = (result.float().div(65535).diff(dim=dim).abs().max() for dim in (1, 2))
        jumps[type(layout)], counts[type(layout)] = max(both).item(), tiles.calls
    assert counts[Blended] == counts[Averaged] == [(1, 3, 64, 64)] * 12
    assert jumps[Averaged] > 0.02
    assert jumps[Blended] < jumps[Averaged] / 10


def test_tiles_begin_where_the_model_wants_them_to(model):
    class Grid(StandIn):
        tiling = Tiling(multiple=8, overlap=9)

        def forward(self, lr):  # every block of 8 pixels becomes its mean
            self.calls.append(tuple(lr.shape))
            height, width = lr.shape[-2:]
            padded = F.pad(lr, (0, -width % 8, 0, -height % 8), mode="replicate")
            means = F.avg_pool2d(padded, 8)
            return means.repeat_interleave(32, -1).repeat_interleave(32, -2)[
                ..., : 4 * height, : 4 * width
            ]

    grid, lr = Grid().eval(), torch.rand(3, 77, 130)
    tiled = upscale_tiled(grid, lr, Blended(32))
    assert len(grid.calls) > 4
    torch.testing.assert_close(tiled, upscale_tiled(grid, lr, Blended(1000)), rtol=0, atol=1)


def test_no_tile_is_larger_than_asked_for(model):
    upscale_tiled(model, torch.rand(3, 150, 330), Blended(64))
    tiling = model.tiling
    largest = 64 + tiling.multiple + 2 * (tiling.blend + tiling.overlap)
    assert len(model.calls) == 3 * 5  # tiles at the border are used up to the border
    assert all(max(shape[-2:]) <= largest for shape in model.calls)


def test_tiles_of_an_image_have_one_shape_and_fill_their_batches(model):
    lr = torch.rand(3, 77, 331)
    upscale_tiled(model, lr, Blended(32), batch=4)
    assert len({shape[2:] for shape in model.calls}) == 1
    assert [shape[0] for shape in model.calls] == 2 * [4, 4, 2]
    model.calls.clear()
    upscale_tiled(model, lr, Blended(32), batch=8)
    assert [shape[0] for shape in model.calls] == 2 * [5, 5]  # not 8 and 2


def test_a_small_image_is_one_tile(model):
    upscale_tiled(model, torch.rand(3, 50, 64), Blended(64))
    assert model.calls == [(1, 3, 50, 64)]
    model.calls.clear()
    upscale_tiled(model, torch.rand(3, 50, 64), Averaged(64, 56))
    assert model.calls == [(1, 3, 50, 64)]


def test_the_size_of_tiles_is_the_models_unless_it_is_given(model):
    model.tiling = replace(model.tiling, default_tile=40)
    lr = torch.rand(3, 8, 80)
    upscale_tiled(model, lr)
    assert len(model.calls) == 2
    upscale_tiled(model, lr, Blended(80))
    assert len(model.calls) == 3


@pytest.mark.parametrize("multiple", [1, 2, 8, 64])
@pytest.mark.parametrize("overlap", [0, 5, 70])
@pytest.mark.parametrize("blend", [0, 4, 12])
def test_placements_for_any_side(multiple, overlap, blend):
    tiling = Tiling(multiple=multiple, overlap=overlap, blend=blend)
    for side in (1, 31, 70, 100, 257, 500, 512, 1001):
        tiles = Blended(48).placements(side, tiling)
        assert tiles[0].used[0] == tiles[0].seen[0] == 0
        assert tiles[-1].used[1] == tiles[-1].seen[1] == side
        assert len({tile.seen[1] - tile.seen[0] for tile in tiles}) == 1
        for before, after in pairwise(tiles):
            assert before.used[0] < after.used[0]
            assert before.used[1] - after.used[0] >= 2 * blend
            assert before.seen[1] - before.used[1] >= overlap
            assert after.used[0] - after.seen[0] >= overlap
        if overlap >= multiple:
            assert all(tile.seen[0] % multiple == 0 for tile in tiles)
        total = torch.zeros(4 * side)
        for tile in tiles:
            assert tile.weights.min() > 0
            total[4 * tile.used[0] : 4 * tile.used[1]] += tile.weights
        torch.testing.assert_close(total, torch.ones(4 * side))


@pytest.mark.parametrize("size", [(500, 500), (1443, 2165)])
@pytest.mark.parametrize(
    ("tiling", "most"),
    [
        (Tiling(multiple=2, overlap=4, blend=8, default_tile=512), 1.10),
        # Padding the whole image to multiples of 64 takes up to 1.05 of it.
        (Tiling(multiple=64, overlap=2), 1.14),
    ],
)
def test_little_is_computed_twice(size, tiling, most):
    assert 1 <= seen_share(Blended(), tiling, *size) <= most
    assert seen_share(Blended(64), tiling, *size) > 1.2  # as small tiles must


def test_progress_counts_every_tile(model):
    seen = []
    lr = torch.rand(3, 70, 40)
    upscale_tiled(model, lr, Blended(20), progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]
    seen.clear()
    upscale_tiled(model, lr, Blended(20), batch=2, progress=lambda *at: seen.append(at))
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_no_memory_is_the_users_to_solve(model):
    def forward(lr):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    model.forward = forward
    with pytest.raises(UserError, match=r"for a tile of 40x9 pixels; pass a smaller --tile$"):
        upscale_tiled(model, torch.rand(3, 9, 40), Blended(64))
    with pytest.raises(UserError, match=r"2 tiles of .* a smaller --batch or a smaller --tile$"):
        upscale_tiled(model, torch.rand(3, 9, 80), Blended(40), batch=4)


def test_other_failures_of_the_model_are_bugs(model):
    with pytest.raises(RuntimeError, match="channels"):
        upscale_tiled(model, torch.rand(5, 9, 40), Blended(64))


class LargestFloats(TorchDispatchMode):
    """Watches for the largest memory, in floats, that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("layout", [Blended(32), Averaged(50, 34)])
def test_floats_exist_for_one_row_of_tiles_only(model, layout):
    with LargestFloats() as largest:
        upscale_tiled(model, torch.rand(3, 400, 20), layout)
    assert 3 * 80 * 160 < largest.numbers < 3 * 80 * 1600 / 7  # of the numbers of the result


class Numbered(StandIn):
    """The authors' test: tile ``k`` is the image, 1 + 0.1 k times as bright."""

    def forward(self, lr):
        self.calls.append(tuple(lr.shape))
        return F.interpolate(lr, scale_factor=4) * (1 + 0.1 * (len(self.calls) - 1))


def test_averaged_layout_reproduces_the_authors_tiles():
    parity = np.load(PARITY)
    for side, starts in json.loads(bytes(parity["starts_json"])).items():
        tiles = Averaged().placements(int(side), StandIn.tiling)
        assert [tile.used[0] for tile in tiles] == starts
        assert all(tile.seen == tile.used for tile in tiles)
    image = parity_image("tile/im", 56, 72)
    tiles, layout = Numbered().eval(), Averaged(24, 20)
    # Levels are of [0, 1] and the authors' values are not: bring the largest, 2.1, inside.
    dark, bright = (
        upscale_tiled(Numbered().eval(), sign * image / 2.1, layout, dtype=torch.uint16)
        for sign in (-1, 1)
    )
    merged = (bright.float() - dark.float()) / 65535 * 2.1
    expected = torch.from_numpy(parity["merged__flat7"])
    torch.testing.assert_close(merged.flatten()[::7], expected, rtol=0, atol=2.1 / 65535)
    upscale_tiled(tiles, image, layout)
    assert len(tiles.calls) == parity["n_tiles"]
    for name, side in (("small_starts_h", 56), ("small_starts_w", 72)):
        starts = [tile.used[0] for tile in layout.placements(side, tiles.tiling)]
        assert starts == parity[name].tolist()


def parity_image(name, height, width):
    """The image that the fixtures' fill rule, "tvq-fill-v1", has under this name."""

    def unit(name, *shape):
        seed = np.frombuffer(hashlib.sha256(f"x:{name}".encode()).digest()[:8], "<u8")
        z = np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
        total = z.view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
        return ((total - 131070) / np.sqrt((2.0**32 - 1) / 3)).reshape(shape)

    coarse = unit(f"{name}:coarse", 3, height // 8, width // 8).repeat(8, 1).repeat(8, 2)
    values = np.clip(0.45 * coarse + 0.15 * unit(name, 3, height, width), -1, 1)
    return torch.from_numpy(values.astype(np.float32))


def test_a_stride_that_would_leave_pixels_out_is_refused():
    for stride in (0, 65):
        with pytest.raises(ValueError, match=r"`stride` must be from 1 to `tile` = 64"):
            Averaged(64, stride)
    assert Averaged.of_size(768) == Averaged()
    for tile in (32, 64, 100, 769):
        assert tile // 2 < Averaged.of_size(tile).stride < tile
