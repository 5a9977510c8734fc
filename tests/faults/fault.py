"""What a planted fault is."""

from typing import NamedTuple


class Fault(NamedTuple):
    """In ``file``, ``old`` becomes ``new``; some test of ``tests``, narrowed by ``only``, fails."""

    file: str
    old: str
    new: str
    tests: str
    only: str = ""
