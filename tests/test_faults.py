"""The suite notices every planted fault of ``tests/faults``."""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.faults import FAULTS

REPO = Path(__file__).parent.parent
EXIT = 100  # added to the exit code of pytest, since any broken process exits with 1
# Third-party imports of the library and its tests, which take most of the time of a run.
PRELOADED = [
    "torch.testing",
    "torch.export",
    "torch._dynamo",
    "einops",
    "hypothesis.strategies",
    "_hypothesis_pytestplugin",
]
OPTIONS = [
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
    "--hypothesis-profile",
    "faults",
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the library and its tests, one per worker, in which faults are planted."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "examples", "benchmarks", "fixtures")
    for part in ("vqprior", "tests"):
        shutil.copytree(REPO / part, folder / part, ignore=ignore)
    shutil.copy(REPO / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="module")
def processes():
    """Forks of a process that has already imported the third-party modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_pytest(folder, arguments):
    """Runs pytest in a new process, which must import the package and tests of ``folder``."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "vqprior")]:
        del sys.modules[name]
    sys.path[:] = [
        str(folder),
        *(p for p in sys.path if Path(p).resolve() not in (REPO, Path.cwd())),
    ]
    sys.dont_write_bytecode = True  # bytecode would outlive the fault
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]  # set for a worker of xdist
    os.chdir(folder)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(EXIT + int(pytest.main([*OPTIONS, "-m", "", *arguments])))


def exit_code(processes, copy, arguments):
    process = processes.Process(target=run_pytest, args=(copy, arguments))
    process.start()
    process.join()
    return process.exitcode


def log(copy):
    return (copy / "log.txt").read_text()[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_the_suite_notices(copy, processes, name):
    fault = FAULTS[name]
    path = copy / "vqprior" / fault.file
    original = path.read_text()
    assert original.count(fault.old) == 1, f"the line is gone: plant {name} somewhere else"
    arguments = [f"tests/{fault.tests}", *(["-k", fault.only] if fault.only else [])]
    path.write_text(original.replace(fault.old, fault.new))
    try:
        code = exit_code(processes, copy, arguments)
    finally:
        path.write_text(original)
    # Other exit codes, such as for an import error or no tests, prove nothing.
    assert code == EXIT + pytest.ExitCode.TESTS_FAILED, log(copy)


def test_without_a_fault_the_copy_passes(copy, processes):
    code = exit_code(processes, copy, ["tests/functional/test_losses.py", "-k", "not compile"])
    assert code == EXIT + pytest.ExitCode.OK, log(copy)
