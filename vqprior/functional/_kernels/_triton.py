"""Whether the kernels for CUDA devices can take over from plain operators."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

# What the kernels compute with: nothing that float32 would round.
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.int64})
_CAPABILITY = (8, 0)  # the oldest that Triton promises to support


def is_usable(*tensors: Tensor) -> bool:
    """Says whether the kernels take these tensors, all on one device that can run them.

    Nothing is imported, launched or waited for; what does not depend on the tensors is found out
    once. AMD devices are refused: the kernels were neither compiled nor run for them.
    """
    devices = {tensor.device for tensor in tensors}
    return (
        len(devices) == 1
        and all(tensor.dtype in _DTYPES for tensor in tensors)
        and _can_run_on(devices.pop())
    )


@functools.cache
def _can_run_on(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and _can_build_launchers()
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= _CAPABILITY
    )


def _can_build_launchers() -> bool:
    """Triton compiles its launchers in C, on the user's machine: slim images cannot."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # In this scheme a virtual environment, too, names the headers of the Python it was made from.
    include = Path(sysconfig.get_path("include", scheme="posix_prefix"))
    return compiler is not None and (include / "Python.h").exists()
