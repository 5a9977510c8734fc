"""Argument checks with uniform error messages.

Every message names the argument, the requirement, the received value and, where possible, what
to do instead.
"""

import itertools
import numbers
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from vqprior._transforms import is_transforming, unwrap

# torch computes hardly anything in the wider unsigned dtypes.
_INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_UNSIGNED_DTYPES = frozenset({torch.uint16, torch.uint32, torch.uint64})


def check_tensor(name: str, value: object) -> None:
    """Raises ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a tensor, got {type(value).__name__}. Convert arrays and lists with "
            "`torch.as_tensor`."
        )


def check_instance(name: str, value: object, kind: type, way_out: str) -> None:
    """Raises ``TypeError`` unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be a {kind.__name__}, got {type(value).__name__}. {way_out}"
        )


def check_last_dim(name: str, tensor: Tensor, dim: int) -> None:
    """Raises ``ValueError`` unless ``tensor`` has shape ``(..., dim)``."""
    if tensor.ndim == 0 or tensor.shape[-1] != dim:
        raise ValueError(
            f"`{name}` must have shape (..., {dim}), got {tuple(tensor.shape)}. "
            "Features come last: for feature maps (b, d, h, w), wrap the quantizer in "
            "`ChannelsFirst`."
        )


def check_shape(name: str, tensor: Tensor, shape: Collection[int]) -> None:
    """Raises ``ValueError`` unless ``tensor`` has exactly ``shape``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises ``TypeError`` unless ``tensor`` has a floating-point dtype."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be a floating-point tensor, got {tensor.dtype}.")


def check_integer(name: str, tensor: Tensor) -> None:
    """Raises ``TypeError`` unless ``tensor`` has an integer dtype that torch computes in."""
    check_tensor(name, tensor)
    if tensor.dtype not in _INDEX_DTYPES:
        unsigned = tensor.dtype in _UNSIGNED_DTYPES
        way_out = " Convert it with `.long()`." if unsigned else ""
        requirement = "a signed or 8-bit integer tensor" if unsigned else "an integer tensor"
        raise TypeError(f"`{name}` must be {requirement}, got {tensor.dtype}.{way_out}")


def check_index_range(name: str, indices: Tensor, size: int) -> None:
    """Raises ``ValueError`` if an index on the CPU is neither -1 nor in ``[0, size)``.

    Does nothing on other devices, where it would force a synchronization, and while tracing. Reads
    through numpy, which is faster, where ``torch.func`` lets it.
    """
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    indices = unwrap(indices)
    if type(indices) is not Tensor or indices.numel() == 0:
        return
    values = indices if is_transforming() else indices.detach().numpy()
    lowest, highest = int(values.min()), int(values.max())
    if lowest < -1 or highest >= size:
        worst = lowest if lowest < -1 else highest
        raise ValueError(f"`{name}` must be -1 or in [0, {size}), got {worst}.")


def check_mask(mask: Tensor, shape: Collection[int]) -> None:
    """Raises unless ``mask`` is a boolean tensor of ``shape``, ``True`` for real tokens."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"`mask` must be a boolean tensor, True for real tokens, got {mask.dtype}. "
            "Convert it with `mask != 0`."
        )
    check_shape("mask", mask, shape)


def check_codes(name: str, codes: Tensor) -> None:
    """Raises unless ``codes`` is a non-empty floating-point matrix ``(k, d)``."""
    check_floating(name, codes)
    if codes.ndim != 2 or codes.numel() == 0:
        raise ValueError(
            f"`{name}` must have shape (k, d) with k and d at least 1, got {tuple(codes.shape)}."
        )


def check_logits(name: str, logits: Tensor) -> None:
    """Raises unless ``logits`` is a floating-point tensor ``(..., k)`` with ``k >= 1``."""
    check_floating(name, logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"`{name}` must have shape (..., k) with k at least 1, got {tuple(logits.shape)}."
        )


def check_number(name: str, value: object) -> None:
    """Raises ``TypeError`` unless ``value`` is a number or a tensor of one."""
    if isinstance(value, (int, float, numbers.Real, torch.SymInt, torch.SymFloat)):
        return
    if not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"`{name}` must be a number, got {_brief(value)}.")


def check_integer_number(name: str, value: object) -> None:
    """Raises ``TypeError`` unless ``value`` is an integer number."""
    if not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"`{name}` must be an integer, got {_brief(value)}.")


def _brief(value: object) -> str:
    return type(value).__name__ if isinstance(value, (Tensor, torch.nn.Module)) else repr(value)


def check_sequence(name: str, value: object, way_out: str) -> None:
    """Raises ``TypeError`` unless ``value`` is a sequence, such as a tuple or a list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"`{name}` must be a sequence, got {_brief(value)}. {way_out}")


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raises unless ``value >= minimum``, and is an integer if ``minimum`` is one."""
    if isinstance(minimum, int):
        check_integer_number(name, value)
    else:
        check_number(name, value)
    if not value >= minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def check_positive(name: str, value: float) -> None:
    """Raises unless ``value > 0``."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"`{name}` must be greater than 0, got {value}.")


def check_callable(name: str, value: object, way_out: str) -> None:
    """Raises ``TypeError`` unless ``value`` is callable."""
    if not callable(value):
        raise TypeError(f"`{name}` must be callable, got {type(value).__name__}. {way_out}")


def check_module(name: str, value: object) -> None:
    """Raises ``TypeError`` unless ``value`` is a ``torch.nn.Module``."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(
            f"`{name}` must be a module, got {type(value).__name__}. Derive its class from "
            "`torch.nn.Module`."
        )


def check_interval(name: str, value: float, low: float, high: float) -> None:
    """Raises unless ``low <= value < high``."""
    check_number(name, value)
    if not low <= value < high:
        raise ValueError(f"`{name}` must be in [{low}, {high}), got {value}.")


def check_fraction(name: str, value: float) -> None:
    """Raises unless ``0 <= value <= 1``."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in sorted(choices))
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def check_feature_map(
    name: str, tensor: Tensor, channels: int | None, *, min_size: int = 1
) -> None:
    """Raises unless ``tensor`` is a floating-point map ``(b, channels, h, w)`` of minimum size.

    ``channels=None`` allows any number of channels.
    """
    check_floating(name, tensor)
    wrong = tensor.ndim != 4 or (channels is not None and tensor.shape[1] != channels)
    if wrong or min(tensor.shape[2:]) < min_size:
        raise ValueError(
            f"`{name}` must have shape (b, {'c' if channels is None else channels}, h, w) with "
            f"h and w at least {min_size}, got {tuple(tensor.shape)}. Channels of feature maps and "
            "images come first."
        )


def no_codebook_error(quantizer: object, method: str) -> TypeError:
    """Returns the error of ``method`` for a quantizer without an explicit codebook."""
    return TypeError(
        f"`quantizer` must have one explicit codebook for `{method}`, got "
        f"{type(quantizer).__name__}. Use a `VectorQuantizer` or a wrapper around one."
    )


def check_scales(scales: Sequence[int | tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Checks that sizes have 1 to 3 dimensions and never decrease; ``p`` becomes ``(p, p)``."""
    check_sequence("scales", scales, "Pass sizes such as (1, 2, 4).")
    for scale in scales:
        for size in scale if isinstance(scale, tuple | list) else (scale,):
            check_integer_number("scales", size)
    sizes = [(scale, scale) if isinstance(scale, int) else tuple(scale) for scale in scales]
    ranks = {len(size) for size in sizes}
    steps = (pair for two in itertools.pairwise(sizes) for pair in zip(*two, strict=False))
    grows = all(before <= after for before, after in steps)
    if not sizes or len(ranks) > 1 or not ranks <= {1, 2, 3} or not grows or min(sizes[0]) < 1:
        raise ValueError(
            "`scales` must hold sizes of 1 to 3 dimensions that never decrease, got "
            f"{list(scales)}. Pass sizes such as (1, 2, 4)."
        )
    return sizes
