"""What a command line means: files, folders, patterns, and what is passed over."""

import os

import pytest

from tvqrap.cli import UserError
from tvqrap.images.inputs import collect_inputs
from tvqrap.training.photos import find_photos


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.png", "a.jpg", "c.WEBP", ".hidden.png", "notes.txt", "sub/d.png", "odd[1].png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def found(*arguments):
    return [str(path).replace(os.sep, "/") for path in collect_inputs(arguments)]


def test_folders_and_patterns(folder):
    assert found("in") == ["in/a.jpg", "in/b.png", "in/c.WEBP", "in/odd[1].png"]
    assert found("in/*.png") == ["in/b.png", "in/odd[1].png"]
    assert found("in/**/*.png") == ["in/b.png", "in/odd[1].png", "in/sub/d.png"]
    assert found(f"{folder}/[ab].*") == [f"{folder}/a.jpg", f"{folder}/b.png"]
    assert found("in/*") == found("in")


def test_every_file_once_in_the_order_of_the_arguments(folder):
    (folder / "link.png").symlink_to(folder / "b.png")
    assert found("in/b.png", "./in/b.png", "in", "in/*.png", "in/link.png")[:2] == [
        "in/b.png",
        "in/a.jpg",
    ]
    assert len(found("in/b.png", "in/link.png", f"{folder}/b.png")) == 1


def test_a_file_is_taken_whatever_its_name(folder):
    assert found("in/notes.txt", "in/odd[1].png", "in/.hidden.png", "missing.png") == [
        "in/notes.txt",
        "in/odd[1].png",
        "in/.hidden.png",
        "missing.png",
    ]


def test_nothing_found(folder):
    with pytest.raises(UserError, match=r"^in/\*\.bmp: no image matches$"):
        found("in/b.png", "in/*.bmp")
    with pytest.raises(UserError, match=r"^empty: no images directly in this folder$"):
        found("empty")


def test_brackets_in_names_are_no_pattern_where_they_exist(folder, monkeypatch):
    for name in ("trip [2024]/x1.png", "trip [2024]/x2.png", "trip 2/x3.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert found("in/trip [2024]/*.png") == ["in/trip [2024]/x1.png", "in/trip [2024]/x2.png"]
    assert found(f"{folder}/trip [2024]/x[12].png", "in/trip [2]/*.png") == [
        f"{folder}/trip [2024]/x1.png", f"{folder}/trip [2024]/x2.png", "in/trip 2/x3.png",
    ]  # fmt: skip
    assert found("in/trip*/**/*.png")[0] == "in/trip 2/x3.png"
    monkeypatch.chdir(folder / "trip [2024]")
    assert found("../trip [2024]/*2.png") == ["../trip [2024]/x2.png"]


def test_pictures_that_are_passed_over_are_named(folder, capsys):
    for name in ("d.mpo", "e.HEIC", "f.psd", "g.mov", ".h.heic"):
        (folder / name).write_bytes(b"")
    assert "in/d.mpo" in found("in")
    note = "note: in: 2 passed over, of formats that cannot be read: e.HEIC, f.psd\n"
    assert capsys.readouterr().err == note
    assert find_photos(folder) == [path for path in collect_inputs([f"{folder}/**"]) if path.name]
    assert capsys.readouterr().err.count("2 passed over") == 2
