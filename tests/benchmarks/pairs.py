"""The pairs of steps that are compared, and the checks that both sides compute the same."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from tests.benchmarks import sides
from tests.benchmarks.sides import Outcome, Step
from tests.benchmarks.timing import Measured, Settings, alternate, summarize
from vqprior.functional import nearest_indices

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FASTER, AS_LONG = "times faster", "times as long"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two steps, and a check that raises ``AssertionError`` unless their results agree."""

    ours: Step
    other: Step
    agree: Callable[[Any, Any], None]


@dataclasses.dataclass(frozen=True)
class Compare:
    """Measures a pair; ``build(device, **sizes)`` makes it."""

    build: Callable[..., Pair]
    unit: str

    def __call__(self, settings: Settings, **sizes: int) -> Measured:
        pair = self.build(settings.device, **sizes)
        pair.agree(pair.ours(), pair.other())  # also the warm-up
        seconds = alternate(pair.ours, pair.other, settings)
        ours, other = seconds.T
        ratios = other / ours if self.unit == FASTER else ours / other
        return summarize(ratios, self.unit, seconds)


def same_choice(x: Tensor, codes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns where two searches agree; elsewhere distances must be equal up to rounding."""
    same = first == second
    rest, table = x[~same].double(), codes.double()
    near, far = ((rest - table[found[~same]]).square().sum(dim=-1) for found in (first, second))
    assert_close(near, far, rtol=1e-5, atol=0.0, msg="the two sides chose other codes")
    return same


def search(device: str, n: int, k: int, d: int, *, tf32: bool = False) -> Pair:
    """Compares the search with its matrix product into preallocated memory."""
    data = sides.tokens(device, n, k, d)
    x, codes = data.x[0], data.codes[0]
    scores = x.new_empty(n, k)

    def product() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.mm(x, codes.T, out=scores)
        torch.backends.cuda.matmul.allow_tf32 = False
        return scores

    def agree(indices: Tensor, scores: Tensor) -> None:
        lengths = codes.square().sum(dim=1)
        found = [(lengths - 2 * part).argmin(dim=1) for part in scores.split(1024)]
        same_choice(x, codes, indices, torch.cat(found))

    return Pair(lambda: nearest_indices(x, codes), product, agree)


def search_against_tf32(device: str, n: int, k: int, d: int) -> Pair:
    """As ``search``, with the product in the reduced precision of tensor cores."""
    pair = search(device, n, k, d, tf32=True)
    # In TF32 the product gives other codes, so results are not compared.
    return Pair(pair.ours, pair.other, lambda *_: None)


def training(device: str, n: int, k: int, d: int, q: int = 1, *, rotation: bool = False) -> Pair:
    """Compares training steps from the same codes on the same tokens."""
    data = sides.tokens(device, n, k, d, q)
    first = sides.ours(data, rotation=rotation).to(device)
    second = sides.theirs(data, rotation=rotation)

    def agree(ours: Outcome, theirs: Outcome) -> None:
        same = _same_indices(data, ours, theirs)
        # `ResidualVQ` passes the gradient once for each stage: q times ours.
        names = ("quantized", "grad") if q == 1 else ("quantized",)
        for name in names:
            assert_close(getattr(ours, name)[same], getattr(theirs, name)[same], **CLOSE)
        assert_close(ours.loss, theirs.loss, **CLOSE)
        assert_close(ours.codes, theirs.codes.view_as(ours.codes), **CLOSE)

    return Pair(
        sides.train_ours(first, data.x, data.direction),
        sides.train_theirs(second, data.x, data.direction),
        agree,
    )


def training_rotated(device: str, n: int, k: int, d: int) -> Pair:
    """As ``training``, with the rotation trick, the default of the other package."""
    return training(device, n, k, d, rotation=True)


def evaluation(device: str, n: int, k: int, d: int) -> Pair:
    """Compares calls in eval with the same codes on the same tokens."""
    data = sides.tokens(device, n, k, d)

    def agree(ours: Outcome, theirs: Outcome) -> None:
        same = _same_indices(data, ours, theirs)
        assert_close(ours.quantized[same], theirs.quantized[same], **CLOSE)

    return Pair(
        sides.evaluate_ours(sides.ours(data).to(device), data.x),
        sides.evaluate_theirs(sides.theirs(data), data.x),
        agree,
    )


def _same_indices(data: sides.Tokens, ours: Outcome, theirs: Outcome) -> Tensor:
    """Returns which tokens have the same indices on both sides: all but ties."""
    if len(data.codes) == 1:
        return same_choice(data.x, data.codes[0], ours.indices, theirs.indices)
    # Inputs of later stages depend on the ties of earlier ones; these tokens have none.
    assert torch.equal(ours.indices, theirs.indices), "the two sides chose other codes"
    return torch.ones_like(ours.indices[..., 0], dtype=torch.bool)


def select(device: str, n: int, k: int, d: int) -> Pair:
    """Compares ``select_codes`` with the textbook formula."""
    made = logits, codes, _ = sides.choices(device, n, k, d)

    def agree(ours: Outcome, textbook: Outcome) -> None:
        assert torch.equal(ours.quantized, codes[logits.argmax(dim=-1)]), "not the codes, exactly"
        assert torch.equal(ours.indices, textbook.indices), "the two sides chose other codes"
        assert_close(ours.quantized, textbook.quantized, **CLOSE)
        assert_close(ours.grad, textbook.grad, **CLOSE)

    return Pair(sides.select_ours(*made), sides.select_textbook(*made), agree)
