"""The benchmarks run, both sides compute the same, the page shows the file; no time is asserted."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks import cases, machine, memory, peer, report, results, runner, timing
from tests.benchmarks.pairs import Compare
from tests.test_public_api import REPO

FOLDER = REPO / "docs" / "benchmarks"
COMPARED = [case for case in cases.CASES if isinstance(case.measure, Compare)]
SMALL = {"n": 96, "k": 24, "d": 8, "q": 3, "b": 2}
SETTINGS = timing.Settings(repeats=3, seconds=0.1, quick=True)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *arguments],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip


def row(part="search", value=1.0, **more):
    case = next(case for case in cases.CASES if case.part == part)
    measured = timing.Measured("times as long", value, 0.9, 1.1, [0.1, 0.1], 3)
    return {**case.row(dict(case.sizes), measured), "measured": "2025-01-01 00:00 UTC", **more}


def some_results(*rows, **more):
    about = {"quick": False, "commit": "abc", "machine": machine.describe(SETTINGS)}
    return {**about, "rows": list(rows), **more}


@pytest.mark.skipif(not FOLDER.exists(), reason="the documentation is not part of this copy")
@pytest.mark.parametrize("name", ["speed", "speed-cuda"])
def test_the_page_shows_the_file(name):
    path = FOLDER / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() or name == "speed" else None
    begin, end = report.markers(name)
    page = (FOLDER / "speed.md").read_text()
    assert page.count(begin) == page.count(end) == 1
    assert page.partition(begin)[2].partition(end)[0].strip() == report.render(found)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.part}: {case.what}")
def test_every_row_names_a_target_or_says_that_there_is_none(case):
    shown = report.target(case.row(case.sizes, timing.Measured("", None)))
    assert shown == "none" or shown.startswith(("at most ", "at least "))
    assert shown in report.line(case.row(case.sizes, timing.Measured("", None)))
    assert case.needs in ("", "peer", "cuda")


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: f"{case.part}: {case.what}")
def test_both_sides_compute_the_same(case):
    if case.needs == "peer":
        pytest.importorskip("vector_quantize_pytorch", reason="the extra `peers` is not installed")
    pair = case.measure.build("cpu", **{name: SMALL[name] for name in case.sizes})
    # Codebooks that a step moved are the same, too; parts keep the inputs of their first.
    for _ in range(2 if case.needs == "peer" else 1):
        pair.agree(pair.ours(), pair.other())


def test_a_difference_is_noticed():
    pair = COMPARED[0].measure.build("cpu", n=96, k=24, d=8)
    indices, scores = pair.ours(), pair.other()
    with pytest.raises(AssertionError):
        pair.agree((indices + 1) % 24, scores)


def test_rounds_alternate_and_end(monkeypatch):
    calls = []
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    settings = timing.Settings(repeats=50, seconds=10.0)
    seconds = timing.alternate(lambda: calls.append("a"), lambda: calls.append("b"), settings)
    assert "".join(calls) == "ab" * timing.FEWEST_ROUNDS
    assert seconds.shape == (timing.FEWEST_ROUNDS, 2)
    assert (seconds == 1).all()


def test_median_and_quartiles():
    found = timing.summarize(np.array([1.0, 5.0, 2.0, 4.0, 3.0]), "times faster")
    assert (found.low, found.value, found.high, found.rounds) == (2.0, 3.0, 4.0, 5)


def test_memory_grows_by_the_tensors_of_the_further_tokens():
    mib = 1 << 20
    rows = [
        {"what": "x", "sizes": {"n": n, "d": 64}, "value": 10 + 3 * n * 256 / mib, "note": ""}
        for n in (100, 1000)
    ]
    memory.beyond_fixed(rows)
    assert rows[0]["note"] == ""
    assert rows[1]["note"].startswith("3.0 tensors")


@pytest.mark.parametrize(
    ("more", "kept"),
    [({}, True), ({"commit": "other"}, False), ({"quick": True}, False), ({"machine": {}}, False)],
)
def test_rows_stay_if_machine_and_code_are_the_same(tmp_path, more, kept):
    path = tmp_path / "speed.json"
    results.save(some_results(row("select"), row("search", 2.0), **more), path)
    now = some_results(row("search"))
    results.keep(now, path, {"search"})
    expected = [("search", 1.0), ("select", 1.0)] if kept else [("search", 1.0)]
    assert [(r["part"], r["value"]) for r in now["rows"]] == expected


def test_rows_of_changed_code_never_stay(tmp_path):
    path = tmp_path / "speed.json"
    results.save(some_results(row("select"), commit="abc with changes"), path)
    now = some_results(row("search"), commit="abc with changes")
    results.keep(now, path, {"search"})
    assert [r["part"] for r in now["rows"]] == ["search"]


def test_the_page_is_rewritten_between_its_markers(tmp_path):
    page = tmp_path / "speed.md"
    begin, end = report.markers("speed")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert report.rewrite(page, "speed", report.render(some_results(row(value=1.5))))
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n| measured")
    assert text.endswith(f"{end}\nafter\n")
    assert "at most 1.25: **missed**" in text
    assert "old" not in text
    assert not report.rewrite(page, "speed-cuda", "")


@pytest.mark.full
def test_without_the_other_package_its_rows_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer, "version", lambda: None)
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    assert runner.run(SETTINGS, {"eval", "select"}, tmp_path) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == peer.MISSING
    assert "VectorQuantizer" not in out
    found = json.loads((tmp_path / "speed.json").read_text())
    assert {row["part"] for row in found["rows"]} == {"select"}


def test_what_is_finished_stays_when_interrupted(tmp_path, monkeypatch, capsys):
    finished = iter([(row("select"), False)])

    def one_row(*_):
        for made in finished:
            return made
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_row", one_row)
    assert runner.run(SETTINGS, {"select"}, tmp_path) == runner.INTERRUPTED == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: 1 of 2 rows")
    assert len(json.loads((tmp_path / "speed.json").read_text())["rows"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.json", "speed.png"]


def test_a_row_that_fails_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    broken = [
        cases.Case("select", "broken", fail, {"n": 1}, "", None),
        next(case for case in cases.CASES if case.part == "select"),
    ]
    monkeypatch.setattr(runner, "CASES", broken)
    assert runner.run(SETTINGS, {"select"}, tmp_path) == 1
    assert "failed: out of luck" in capsys.readouterr().out
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["value"] is None for row in rows] == [True, False]


@pytest.mark.full
def test_the_command_writes_file_and_image(tmp_path):
    done = command(
        "--quick", "--only", "search", "exactness", "--threads", "1", "--output", tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["quick"]
    assert found["machine"]["threads"] == 1
    wanted = [
        case for case in cases.CASES if case.part in ("search", "exactness") and not case.needs
    ]
    assert [row["what"] for row in found["rows"]] == [case.what for case in wanted]
    assert all(row["value"] is not None for row in found["rows"])
    with Image.open(tmp_path / "speed.png") as image:
        image.verify()
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json", "speed.png"}


@pytest.mark.full
def test_memory_is_measured_in_a_process_of_its_own():
    peak = memory.Peak("training, ours")
    tensor = 65536 * 64 * memory.FLOAT / memory.MIB
    # The result and the gradient at least, and not the inputs.
    assert 2 * tensor < peak(SETTINGS, n=65536, k=16, d=64).value < 20 * tensor


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "search", "nothing"], f"there are {', '.join(cases.PARTS_IN_ORDER)}"),
        (["--threads", "0"], "must be at least 1"),
        (["--quick", "--only", "search", "--output", "pyproject.toml"], "pyproject.toml"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    done = command(*arguments)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
    assert done.stdout == ""
