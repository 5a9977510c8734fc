"""The machinery of the other tests: it reports what failed, and ends what would not."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run, same_on_all_ranks

pytestmark = pytest.mark.distributed


def passes(rank, world):
    yield
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world)


def differs(rank, world):
    yield
    same_on_all_ranks(torch.tensor(float(rank)))


def fails_before_the_group(rank, world):
    raise RuntimeError("too early")
    yield


def hangs_on_one_rank(rank, world):
    yield
    if rank == 1:
        time.sleep(600)


def test_what_fails_is_reported_with_its_traceback(tmp_path):
    checks = {f.__name__: f for f in (passes, differs, fails_before_the_group)}
    for report in run(checks, 2, tmp_path):
        assert report["passes"] == ""
        assert "same_on_all_ranks" in report["differs"]
        assert "too early" in report["fails_before_the_group"]


def test_a_rank_that_does_not_end_is_ended_and_says_where_it_stood(tmp_path):
    checks = {f.__name__: f for f in (passes, hangs_on_one_rank)}
    reports = run(checks, 2, tmp_path, limit=3)
    assert [report["passes"] for report in reports] == ["", ""]
    stuck = reports[1]["hangs_on_one_rank"]
    assert "no end after 3 seconds" in stuck
    assert "hangs_on_one_rank" in stuck.partition("no end")[2]
