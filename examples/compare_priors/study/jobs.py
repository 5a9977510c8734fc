"""Several rows at a time, each in a process of its own."""

import functools
import itertools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from study.runner import Runner
from study.table import Row
from tvqrap.cli import UserError

_make_runner: Callable[[], Runner]  # of a process that does rows


def results(rows: list[Row], make_runner: Callable[[], Runner], jobs: int) -> Iterator[tuple]:
    """Does rows that are not done, one after another or several at a time.

    Args:
        rows: Which, each after those that it starts from.
        make_runner: Is called once in each process, so it must be picklable for several.
        jobs: How many rows are done at a time.

    Yields:
        Rows and their results, as they are finished.

    Raises:
        UserError: If a process has died.
    """
    if jobs == 1:
        runner = make_runner()
        for row in rows:
            yield row, runner.result(row)
        return
    # A process that has touched a GPU cannot be forked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin, (make_runner,))
    try:
        yield from _in_order(rows, pool, jobs)
    except BrokenProcessPool:
        raise UserError(
            "a process that does rows has died, perhaps for want of memory; the same command with "
            "fewer --jobs goes on"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def with_needs(rows: list[Row]) -> list[Row]:
    """Returns rows and all that they start from, each once and after what it needs."""
    found: dict[Row, None] = {}
    for row in rows:
        found |= dict.fromkeys((*with_needs(list(row.needs)), row))
    return list(found)


def _in_order(rows: list[Row], pool: ProcessPoolExecutor, jobs: int) -> Iterator[tuple]:
    waiting = dict.fromkeys(rows)
    running: dict[Future, Row] = {}
    while waiting or running:
        held_up = {*waiting, *running.values()}
        ready = (row for row in list(waiting) if held_up.isdisjoint(row.needs))
        # No more than can start now: of what is ready later, the earliest row is to be next.
        for row in itertools.islice(ready, jobs - len(running)):
            del waiting[row]
            running[pool.submit(_do, row)] = row
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield running.pop(future), future.result()


def _begin(make_runner: Callable[[], Runner]) -> None:
    global _make_runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it ends it,
    signal.signal(signal.SIGTERM, _leave)  # and it cleans up
    _make_runner = functools.cache(make_runner)


def _leave(*_: object) -> None:
    sys.exit(1)


def _do(row: Row) -> dict:
    # Made here, not at the beginning: what goes wrong is then raised where it is reported.
    return _make_runner().result(row)
