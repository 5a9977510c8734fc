"""Runs checks on several gloo ranks, with a time limit.

A check is a generator. The code before its first ``yield`` runs without a process group, to compute
the reference of one process with the joint batch; the code after it runs on all ranks in a group;
the code after a second ``yield`` runs when the group has ended. All checks of a file run in one
spawn.
"""

import datetime
import faulthandler
import time
import traceback

import torch
import torch.distributed as dist
from torch.testing import assert_close

from vqprior import CodebookEMA, CodebookRevival, _distributed

WAIT = 30  # seconds until gloo gives up a collective
LIMIT = 240  # seconds for all checks of a file


def exactly(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


def same_on_all_ranks(tensor):
    parts = _distributed.all_gather_stack(tensor)
    exactly(parts, parts[:1].expand_as(parts))


def draw(count, shape, generator, *, valid=True):
    """Random quarters ``(count, *shape)`` and a mask over all dimensions but the last.

    Sums of quarters do not round, so the order of summation does not matter.
    """
    x = torch.randint(-12, 13, (count, *shape), generator=generator) / 4
    mask = torch.rand(count, *shape[:-1], generator=generator) > 0.2
    return x, mask & valid


def batches(*shape, world):
    """``(x, mask)`` for each step and rank: of unequal sizes, some without a valid token."""
    generator = torch.Generator().manual_seed(0)
    sizes = [
        [5, 12, 3, 8],
        [9, 4, 1, 1],
        [-7, 6, 5, -2],  # negative: all tokens are masked
        [8, 0, 0, 7],
        [0, 0, 0, 0],
        [-3, -2, 0, -1],
        [20, 1, 2, 6],
    ]
    return [
        [draw(abs(size), shape, generator, valid=size > 0) for size in step[:world]]
        for step in sizes
    ]


def joint(parts):
    """Joins the batches of all ranks in order: the batch of one process."""
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def seeded(make):
    torch.manual_seed(3)
    return make()


def ema(quantizer):
    return CodebookEMA(quantizer, decay=0.5)


def revival(quantizer):
    return CodebookRevival(quantizer, patience=1.5, threshold=0.5)


def collected(checks, request):
    """The checks of a file that pytest selected, by their parameter `name`."""
    tests = [item for item in request.session.items if item.path == request.path]
    names = {test.callspec.params["name"] for test in tests if hasattr(test, "callspec")}
    return {name: check for name, check in checks.items() if name in names}


def run(checks, world, folder, *, limit=LIMIT):
    """Runs the checks and returns, per rank, an empty string or a traceback for each check.

    Ranks still running after ``limit`` seconds report their stack and are killed.
    """
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    context = torch.multiprocessing.start_processes(
        _work,
        args=(checks, world, folder, limit),
        nprocs=world,
        join=False,
        start_method="forkserver",  # imports the modules only once
    )
    crash, deadline = "", time.monotonic() + limit + 60  # ranks start later and need time to report
    stacks = [folder / f"{rank}.stack" for rank in range(world)]
    try:
        while not context.join(timeout=1):
            pairs = zip(context.processes, stacks, strict=True)
            silent = [p for p, stack in pairs if p.is_alive() and not _is_written(stack)]
            if not silent or time.monotonic() > deadline:
                crash = f"no end after {limit} seconds"
                break
    except Exception:  # a failed check can desynchronize ranks and abort later checks
        crash = traceback.format_exc()
    for process in context.processes:
        if process.is_alive():
            process.kill()
        process.join()
    reports = []
    for rank in range(world):
        saved, stack = folder / f"{rank}.pt", stacks[rank]
        stood = stack.read_text() if stack.exists() else ""
        unfinished = dict.fromkeys(checks, f"did not finish: {crash}\n{stood}")
        reports.append(unfinished | (torch.load(saved) if saved.exists() else {}))
    return reports


def _is_written(file):
    return file.exists() and file.stat().st_size > 0


def _work(rank, checks, world, folder, limit):
    torch.set_num_threads(1)
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(limit, file=stack)
        running, reports = {}, {}
        for name, function in checks.items():
            try:
                steps = function(rank, world)
                next(steps)
                running[name] = steps
            except BaseException:
                reports[name] = traceback.format_exc()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=WAIT),
        )
        for name, steps in running.items():
            try:
                next(steps, None)
                reports[name] = ""
            except BaseException:
                reports[name] = traceback.format_exc()
            torch.save(reports, folder / f"{rank}.pt")  # a later check may abort the process
        dist.destroy_process_group()
        for name, steps in running.items():
            try:
                assert next(steps, "done") == "done"
            except BaseException:
                reports[name] = traceback.format_exc()
        torch.save(reports, folder / f"{rank}.pt")
        faulthandler.cancel_dump_traceback_later()
