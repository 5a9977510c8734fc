"""Check whether the Triton kernels can be used."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

# Dtypes that the kernels accept; float64 would lose precision, since they compute in float32.
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.int64})
_CAPABILITY = (8, 0)  # the lowest that Triton supports


def is_usable(*tensors: Tensor) -> bool:
    """Whether these tensors have supported dtypes and share one device that runs the kernels.

    Imports and launches nothing and does not synchronize; the check of a device is cached. AMD
    devices are refused, because the kernels were never compiled or run for them.
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
    """Whether Triton can compile its C launchers here; slim container images often lack this."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    # In a virtual environment, this scheme gives the headers of the base Python.
    include = Path(sysconfig.get_path("include", scheme="posix_prefix"))
    return compiler is not None and (include / "Python.h").exists()
