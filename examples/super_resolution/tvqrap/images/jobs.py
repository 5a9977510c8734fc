"""Output names: each source gets its own files, and nothing is overwritten."""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tvqrap.cli import UserError

Identity = tuple[int, int]


@dataclass(frozen=True)
class Job:
    """One image to upscale, and the files to write."""

    source: Path
    result: Path
    comparison: Path | None = None

    @property
    def outputs(self) -> tuple[Path, ...]:
        """All files that will be written."""
        return (self.result,) if self.comparison is None else (self.result, self.comparison)


def plan_jobs(sources: Sequence[Path], output: Path, suffix: str, *, compare: bool) -> list[Job]:
    """Gives every source its own output files.

    A result has the name of its source. If several sources would get the same name (``a.png`` and
    ``a.jpg``, or ``x/a.png`` and ``y/a.png``), the old suffix, then the folder, then a number are
    added. Case is ignored, because some file systems ignore it.
    """
    names = [path.stem for path in sources]
    longer = (
        lambda path: f"{path.stem}_{path.suffix.lstrip('.')}",
        lambda path: f"{path.resolve().parent.name}_{path.name.replace('.', '_')}",
    )
    for lengthen in longer:
        count = Counter(name.casefold() for name in names)
        names = [
            lengthen(path) if count[name.casefold()] > 1 else name
            for path, name in zip(sources, names, strict=True)
        ]
    jobs: list[Job] = []
    taken: set[str] = set()
    for source, name in zip(sources, names, strict=True):
        job, number = _job(source, output, name, suffix, compare=compare), 1
        while taken & _keys(job):
            number += 1
            job = _job(source, output, f"{name}_{number}", suffix, compare=compare)
        taken |= _keys(job)
        jobs.append(job)
    return jobs


def check_job(job: Job, inputs: set[Identity | None], *, overwrite: bool) -> None:
    """Checks before any work that a job overwrites no input and, by default, no file.

    Args:
        job: The job to check.
        inputs: Identities of all images that are read.
        overwrite: Whether files that are not inputs may be replaced.

    Raises:
        UserError: If an output exists and ``overwrite`` is False, or is an input.
    """
    existing = [path for path in job.outputs if os.path.lexists(path)]
    for path in existing:
        if path.exists() and identity_of(path) in inputs:
            raise UserError(f"{path} would be overwritten, but is an input; use another --output")
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists already; pass --overwrite to replace it")


def identity_of(path: Path) -> Identity | None:
    """Returns what all names of one file have in common; ``None`` if there is no such file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _job(source: Path, output: Path, name: str, suffix: str, *, compare: bool) -> Job:
    beside = output / f"{name}_comparison.png" if compare else None
    return Job(source, output / f"{name}.{suffix}", beside)


def _keys(job: Job) -> set[str]:
    return {path.name.casefold() for path in job.outputs}
