"""compare.py --jobs: rows beside each other, in processes of their own."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from study import jobs
from study.images import Images
from study.plan import Extent
from study.runner import Runner
from study.setting import Setting
from tvqrap.cli import UserError

NOW = Extent(seeds=1, scale=1e-9)  # one step of everything
TOKENIZERS = [NOW.tokenizer(prior, 0) for prior in ("texture-lr", "plain")]
PREDICTORS = [NOW.predictor(tokenizer, "code-longer") for tokenizer in TOKENIZERS]
ROWS = jobs.with_needs([*PREDICTORS, *TOKENIZERS])


def make_runner(out, folders):
    torch.set_num_threads(1)  # as here, or sums round otherwise in the processes
    return Runner(out, Setting(Images(*folders, most=2), jobs=2, quiet=True))


def end_at_once():
    os._exit(1)


def test_rows_follow_those_that_they_start_from():
    assert len(ROWS) == 6  # and the code-level predictors between
    assert set(ROWS) > {*TOKENIZERS, *PREDICTORS}
    for place, row in enumerate(ROWS):
        assert set(row.needs) <= set(ROWS[:place])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_row_begins_before_what_it_needs(monkeypatch, count):
    lock, running, done, most = threading.Lock(), set(), [], 0

    def do(row):
        nonlocal most
        with lock:
            assert set(row.needs) <= set(done)
            running.add(row)
            most = max(most, len(running))
        time.sleep(0.01)
        with lock:
            running.remove(row)
            done.append(row)
        return {"of": row.name}

    monkeypatch.setattr(jobs, "_do", do)
    with ThreadPoolExecutor(10) as pool:
        found = dict(jobs._in_order(ROWS, pool, count))
    assert found == {row: {"of": row.name} for row in ROWS}
    assert most == min(count, 2)  # what can be done at once
    if count == 1:
        assert done == ROWS


@pytest.mark.full
def test_several_processes_do_the_same_rows(tmp_path, folders):
    alone, together = (
        {
            row.name: {**result, "seconds": 0, "machine": 0}
            for row, result in jobs.results(
                ROWS, partial(make_runner, tmp_path / str(count), folders), count
            )
        }
        for count in (1, 2)
    )
    assert together == alone
    assert len(alone) == len(ROWS)


class Slow:
    """Does the first row at once, and leaves a file when it has done another."""

    def __init__(self, out):
        self.out = out

    def result(self, row):
        if row != ROWS[0]:
            time.sleep(20)
            (self.out / "waited").touch()
        return {}


@pytest.mark.full
def test_who_stops_waits_for_no_row_and_leaves_no_process_behind(tmp_path, capfd):
    found = jobs.results(ROWS, partial(Slow, tmp_path), 2)
    assert next(found) == (ROWS[0], {})
    found.close()
    assert not multiprocessing.active_children()
    assert not (tmp_path / "waited").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.full
def test_a_process_that_dies_is_one_line():
    with pytest.raises(UserError, match="has died"):
        list(jobs.results(ROWS, end_at_once, 2))


@pytest.mark.full
def test_a_mistake_is_raised_where_it_is_reported(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list(jobs.results(ROWS, partial(make_runner, tmp_path, [tmp_path / "nowhere"] * 2), 2))
