"""Photos and crops: found, decoded, cut, reduced and numbered, whoever asks for them."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tvqrap.cli import UserError
from tvqrap.images.pairs import make_pair
from tvqrap.training.data import (
    AUGMENTATIONS,
    Crops,
    SampleNumbers,
    Split,
    average_areas,
    extend,
    reading,
    reduce_part,
)
from tvqrap.training.photos import PhotoFiles

CPU = torch.device("cpu")


def save_noise(path, width=128, height=96, seed=0):
    path.parent.mkdir(exist_ok=True, parents=True)
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        save_noise(tmp_path / "photos" / f"{number}.png", seed=number)
    return tmp_path / "photos"


def crops(folder, *, crop=32, augmentation="crop_flip_rotate", seed=3):
    return Crops(PhotoFiles(folder), crop=crop, augmentation=augmentation, seed=seed)


class TestPhotos:
    def test_folders_are_searched_in_depth_and_in_order(self, tmp_path):
        inner = save_noise(tmp_path / "b" / "c" / "1.png")
        outer = save_noise(tmp_path / "a.png")
        save_noise(tmp_path / ".hidden" / "2.png")
        (tmp_path / "notes.txt").write_text("no photo")
        assert PhotoFiles(tmp_path).paths == [outer, inner]

    def test_a_list_names_files_relative_to_itself(self, tmp_path):
        second, first = save_noise(tmp_path / "x" / "1.png"), save_noise(tmp_path / "2.png")
        (tmp_path / "list.txt").write_text(f"2.png\n\nx/1.png\n{first}\n", encoding="utf-8")
        assert PhotoFiles(tmp_path / "list.txt").paths == [first, second, first]

    def test_a_list_that_names_missing_files(self, tmp_path, capsys):
        (tmp_path / "list.txt").write_text("gone.png\n")
        with pytest.raises(UserError, match=r"none of the 1 photos .*gone\.png: No such file"):
            PhotoFiles(tmp_path / "list.txt")
        there = save_noise(tmp_path / "1.png")
        (tmp_path / "list.txt").write_text("gone.png\n1.png\n")
        assert PhotoFiles(tmp_path / "list.txt").paths == [there]
        assert "gone.png: No such file or directory; it is left out" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"\n", "this list of photos is empty"), (b"\xff\xd8\xff", "not a list of photos")],
    )
    def test_what_is_no_list(self, content, message, tmp_path):
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(UserError, match=message):
            PhotoFiles(tmp_path / "list")

    def test_small_photos_are_left_out_with_a_note(self, folder, capsys):
        save_noise(folder / "small.png", width=40)
        assert len(PhotoFiles(folder, smallest=64)) == 4
        assert "1 photos smaller than the crop are left out" in capsys.readouterr().err
        PhotoFiles(folder, smallest=64, quiet=True)
        assert capsys.readouterr().err == ""

    def test_decoded_photos_are_kept_as_long_as_there_is_room(self, folder):
        photos = PhotoFiles(folder, capacity=2 * 128 * 96 * 3)
        first = photos[0]
        assert photos[0] is first
        for number in (1, 0, 2):
            photos[number]
        assert photos[0] is first  # used after 1, which had to go
        photos[1], photos[2]
        assert photos[0] is not first
        assert_close(torch.tensor(photos[0]), torch.tensor(first), rtol=0, atol=0)


class TestCrops:
    @pytest.mark.parametrize("augmentation", AUGMENTATIONS)
    def test_a_sample_depends_on_seed_and_number_alone(self, augmentation, folder):
        first, again = (crops(folder, augmentation=augmentation) for _ in range(2))
        again.batch(range(5))
        assert_close(first.batch(range(7, 9)), again.batch(range(7, 9)), rtol=0, atol=0)
        assert_close(first.batch(range(-2, 0)), again.batch(range(-2, 0)), rtol=0, atol=0)
        other = crops(folder, augmentation=augmentation, seed=4)
        for unlike in (first.batch(range(9, 11)), other.batch(range(7, 9))):
            assert not torch.equal(first.batch(range(7, 9)).hr, unlike.hr)
        assert len(set(first.batch(range(50)).seeds)) == 50

    @pytest.mark.parametrize(
        ("augmentation", "size"),
        [
            ("crop_flip_rotate", (131, 66)),
            *itertools.product(("crop_flip", "resize_flip"), [(5, 7), (40, 101), (131, 66)]),
        ],
    )
    def test_crops_of_both_sizes_from_photos_of_any(self, augmentation, size, tmp_path):
        save_noise(tmp_path / "1.png", *size)
        batch = crops(tmp_path, crop=64, augmentation=augmentation).batch(range(3))
        assert batch.hr.shape == (3, 3, 64, 64)
        assert batch.lr.shape == (3, 3, 16, 16)
        assert batch.hr.dtype == batch.lr.dtype == torch.uint8

    def test_turned_crops_of_both_sizes_show_the_same_place(self, folder):
        batch = crops(folder, crop=64).batch(range(16)).to(CPU)
        reduced = torch.nn.functional.interpolate(
            batch.hr, scale_factor=0.25, mode="bicubic", antialias=True
        )
        inside = (..., slice(2, -2), slice(2, -2))  # crops see no border, reduced crops do
        # Rounding to 8 bits is the only other difference.
        assert_close(reduced[inside], batch.lr[inside], rtol=0, atol=1.5 / 255)

    def test_a_reduced_part_is_the_part_of_the_reduced_whole(self, tmp_path):
        """Bit for bit, in corners, at edges and inside, for a size that 4 does not divide."""
        path = save_noise(tmp_path / "1.png", width=203, height=118)
        pair = make_pair(path)
        hr = np.ascontiguousarray(pair.hr.permute(1, 2, 0).numpy())
        lr = pair.lr.permute(1, 2, 0).numpy()
        for top in range(0, hr.shape[0] - 32 + 1, 4):
            for left in range(0, hr.shape[1] - 32 + 1, 4):
                expected = lr[top // 4 :, left // 4 :][:8, :8]
                assert np.array_equal(reduce_part(hr, top, left, 32), expected)

    def test_small_photos_are_mirrored(self):
        photo = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
        extended = extend(photo, 4)[..., 0]
        assert extended.tolist() == [[0, 1, 2, 1], [3, 4, 5, 4], [0, 1, 2, 1], [3, 4, 5, 4]]
        assert extend(photo, 1).tolist() == photo.tolist()

    def test_areas_are_averaged_with_parts_of_pixels(self):
        square = np.array([[0, 30, 60], [30, 60, 90], [60, 90, 120]], dtype=np.uint8)[..., None]
        # Along a side, a pixel of the result has one pixel and half of the middle one.
        assert average_areas(square, 2)[..., 0].tolist() == [[20, 60], [60, 100]]
        assert average_areas(square, 3) is square
        large = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        means = large.reshape(24, 4, 24, 4, 3).mean(axis=(1, 3))
        assert np.abs(average_areas(large, 24) - means).max() <= 0.5


class TestBatches:
    @pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 3)])
    def test_parts_are_slices_of_the_joint_batch(self, processes, accumulate):
        splits = [Split(12, rank, processes, accumulate) for rank in range(processes)]
        parts = [part for split in splits for part in split.parts()]
        assert [number for part in parts for number in part] == list(range(12))
        streams = [iter(SampleNumbers(split, 5)) for split in splits]
        numbers = [list(next(s)) for s in streams for _ in range(accumulate)]
        assert [number for part in numbers for number in part] == list(range(60, 72))
        assert next(streams[0])[0] == 72

    def test_an_uneven_share_is_refused(self):
        with pytest.raises(
            UserError, match=r"--batch: 12 samples .* among 2 processes x --accu.* 4"
        ):
            Split(12, 0, 2, 4)

    @pytest.mark.full
    def test_workers_change_nothing_and_draw_no_random_number(self, folder):
        before = torch.get_rng_state()
        read = []
        for workers in (0, 2):
            numbers = SampleNumbers(Split(4, accumulate=2), 3)
            with reading(crops(folder), numbers, workers=workers, device=CPU) as batches:
                read.append([next(batches) for _ in range(5)])
        assert_close(*read, rtol=0, atol=0)
        assert torch.equal(before, torch.get_rng_state())
