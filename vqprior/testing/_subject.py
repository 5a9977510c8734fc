"""Inputs for a quantizer under test, and comparisons of results."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from vqprior._interfaces import Quantizer
from vqprior._results import QuantizerOutput


def expect(condition: object, law: str, what: str) -> None:
    """Raises ``AssertionError`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(f"{law}: {what}")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.equal(b)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding in the less precise of their dtypes."""
    if a.shape != b.shape:
        return False
    eps = max(torch.finfo(t.dtype).eps for t in (a, b))
    a, b = a.cpu().double(), b.cpu().double()
    size = torch.maximum(a.abs().amax(), b.abs().amax()) if a.numel() else a.new_zeros(())
    return bool(((a - b).abs() <= 100 * eps * (1 + size)).all())


@dataclasses.dataclass(frozen=True)
class Subject:
    """Creates identical quantizers and inputs for them.

    Attributes:
        make: The user's factory.
        dim: Number of features of a token.
        shape: Leading dimensions of the input.
        device: Device of quantizers and inputs.
    """

    make: Callable[[], Quantizer]
    dim: int
    shape: tuple[int, ...]
    device: str

    def quantizer(self, *, training: bool) -> Quantizer:
        """Returns a new quantizer; all calls return equal ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            quantizer = self.make()
        return quantizer.to(self.device).train(training)

    def x(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns random input in the layout of the quantizer."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*self.shape, self.dim, generator=generator)
        return self.arrange(x.to(self.device, dtype))

    def mask(self) -> Tensor:
        """Returns a mask that is False for one of three tokens."""
        count = torch.Size(self.shape).numel()
        return (torch.arange(count, device=self.device) % 3 != 1).reshape(self.shape)

    def arrange(self, features_last: Tensor) -> Tensor:
        """Moves the features to the dimension that the quantizer expects."""
        return features_last if self.features_last else features_last.movedim(-1, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """Moves the features to the end."""
        return x if self.features_last else x.movedim(1, -1)

    @property
    def features_last(self) -> bool:
        """Whether the layout is ``(..., d)``."""
        return self.make().features_last


def fields(out: QuantizerOutput) -> dict[str, Tensor]:
    """Returns the tensors of a result by name."""
    tensors = {"quantized": out.quantized, "indices": out.indices, "loss": out.loss}
    tensors.update({f"terms[{name!r}]": term for name, term in out.terms.items()})
    for number, selection in enumerate(out.selections):
        for field in dataclasses.fields(selection):
            tensors[f"selections[{number}].{field.name}"] = getattr(selection, field.name)
    return tensors


def first_difference(a: QuantizerOutput, b: QuantizerOutput) -> str | None:
    """Returns the name of the first field in which two results differ, or None."""
    ours, theirs = fields(a), fields(b)
    if ours.keys() != theirs.keys():
        return "the set of fields"
    return next((name for name in ours if not same(ours[name], theirs[name])), None)
