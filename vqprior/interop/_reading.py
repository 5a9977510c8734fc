"""Reads state dicts of other projects and checks every key before anything is built."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

Layer = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""


class Reader:
    """Takes the tensors of one quantizer out of a state dict, by name, and checks them.

    Keys that do not begin with ``prefix`` are ignored. Errors show full keys, with the prefix.
    """

    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str, source: str) -> None:
        self._source = source
        self._prefix = prefix
        self._left = {
            key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)
        }
        if not self._left:
            found = ", ".join(repr(key) for key in list(state_dict)[:3]) or "no key at all"
            raise ValueError(
                f"`state_dict` must hold keys that begin with {prefix!r}, got {found}. Set "
                "`prefix` to the prefix of the quantizer's keys."
            )
        for name, value in self._left.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"`state_dict` must hold tensors, got a {type(value).__name__} at "
                    f"{prefix + name!r}. Pass the nested state dict."
                )
        self._present = frozenset(self._left)

    def has(self, name: str) -> bool:
        """Whether the state dict has ``name``."""
        return name in self._present

    def count(self, before: str = "") -> int:
        """Returns how many different numbers follow ``before`` in the names, before a dot."""
        pattern = re.compile(re.escape(before) + r"(\d+)\.")
        # If a number is missing, `take` of the first ones reports it.
        return len({found[1] for name in self._present if (found := pattern.match(name))})

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Takes a floating-point tensor of ``shape``; None allows any size of at least 1."""
        value = self.take_any(name, *shape)
        if not value.is_floating_point():
            raise ValueError(
                f"`state_dict` must hold a floating-point tensor at {self._prefix + name!r}, got "
                f"{value.dtype}. Dequantize the weights first."
            )
        return value

    def take_any(self, name: str, *shape: int | None) -> Tensor:
        """Takes a tensor of ``shape`` and of any dtype."""
        if name not in self._left:
            raise ValueError(
                f"`state_dict` must hold {self._prefix + name!r}, a tensor of a {self._source}, "
                f"got no such key. Check the options of the quantizer and `prefix`, which is "
                f"{self._prefix!r}."
            )
        value = self._left.pop(name)
        fits = value.ndim == len(shape) and all(
            found == wanted or (wanted is None and found > 0)
            for found, wanted in zip(value.shape, shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("n" if size is None else str(size) for size in shape)
            wanted = f"({sizes},)" if len(shape) == 1 else f"({sizes})"
            raise ValueError(
                f"`state_dict` must hold a tensor of shape {wanted} at {self._prefix + name!r}, "
                f"got {tuple(value.shape)}. Check the options of the quantizer."
            )
        return value

    def linear(
        self, name: str, in_features: int | None = None, out_features: int | None = None
    ) -> Layer:
        """Takes the weight of a linear layer, and its bias if it has one."""
        weight = self.take(f"{name}.weight", out_features, in_features)
        has_bias = self.has(f"{name}.bias")
        return weight, self.take(f"{name}.bias", weight.shape[0]) if has_bias else None

    def finish(self) -> None:
        """Raises if a tensor was not taken."""
        for name in self._left:
            raise ValueError(
                f"`state_dict` must hold only tensors of a {self._source}, got "
                f"{self._prefix + name!r}. Set `prefix` to read one part of a model. If the key "
                "belongs to an option of the quantizer, that option is not supported."
            )


def check_stated(name: str, value: object, meanings: Mapping[str, str]) -> None:
    """Raises unless ``value`` is a key of ``meanings``, whose values say which projects mean it.

    For what several projects do differently with tensors of the same names and shapes.
    """
    if value not in meanings:
        listed = ", ".join(f"{choice!r} ({who})" for choice, who in meanings.items())
        raise ValueError(
            f"`{name}` must be one of {listed}, got {value!r}. Look it up in the code that saved "
            "the state dict, which does not show it."
        )


def reject(key: str, requirement: str, got: object, way_out: str) -> ValueError:
    """Returns the error for a tensor whose value cannot be used."""
    return ValueError(f"`state_dict` must {requirement} at {key!r}, got {got}. {way_out}")


def to_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Returns a linear layer with copies of these parameters, in their dtype."""
    out_features, in_features = weight.shape
    # On the meta device, so that no random numbers are drawn for weights that are replaced.
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
