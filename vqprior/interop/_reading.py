"""Reading foreign state dicts: every entry is accounted for before anything is built."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

Layer = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""


class Reader:
    """Takes the entries of one quantizer out of a state dict, checked, by name.

    Entries whose name does not begin with ``prefix`` are not looked at. Errors name the key in
    full, as it is found in the file.
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
                "`prefix` to what comes before the names of the quantizer."
            )
        for name, value in self._left.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"`state_dict` must hold tensors, got a {type(value).__name__} at "
                    f"{prefix + name!r}. Pass the state dict that lies inside."
                )
        self._present = frozenset(self._left)

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name."""
        return name in self._present

    def count(self, before: str = "") -> int:
        """How many numbers follow ``before`` in the names, each with a dot behind it."""
        pattern = re.compile(re.escape(before) + r"(\d+)\.")
        # Distinct ones: where one is left out, taking the first so many reports it.
        return len({found[1] for name in self._present if (found := pattern.match(name))})

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Takes a floating-point tensor of ``shape``, where None is any size of at least 1."""
        value = self.take_any(name, *shape)
        if not value.is_floating_point():
            raise ValueError(
                f"`state_dict` must hold a floating-point tensor at {self._prefix + name!r}, got "
                f"{value.dtype}. Convert quantized weights back first."
            )
        return value

    def take_any(self, name: str, *shape: int | None) -> Tensor:
        """As ``take``, of any dtype."""
        if name not in self._left:
            raise ValueError(
                f"`state_dict` must hold {self._prefix + name!r}, a tensor of a {self._source}, "
                f"got no such key. Check `prefix`, here {self._prefix!r}, and the options of the "
                "quantizer."
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
        """Takes weight and, where there is one, bias of a linear layer."""
        weight = self.take(f"{name}.weight", out_features, in_features)
        has_bias = self.has(f"{name}.bias")
        return weight, self.take(f"{name}.bias", weight.shape[0]) if has_bias else None

    def finish(self) -> None:
        """Raises if an entry was not taken."""
        for name in self._left:
            raise ValueError(
                f"`state_dict` must hold nothing but what belongs to a {self._source}, got "
                f"{self._prefix + name!r} too. Set `prefix` to read a part of a model; an option "
                "that has this entry is not offered."
            )


def reject(key: str, requirement: str, got: object, way_out: str) -> ValueError:
    """The error for an entry whose value cannot be used."""
    return ValueError(f"`state_dict` must {requirement} at {key!r}, got {got}. {way_out}")


def to_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of these parameters, in their dtype."""
    out_features, in_features = weight.shape
    # On the meta device: a start that is thrown away must not draw random numbers.
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
