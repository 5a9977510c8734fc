"""The steps to time: ours, the other package's, and the textbook's."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks import peer
from vqprior import CodebookEMA, EmbeddingCodebook, Quantizer, ResidualQuantizer, VectorQuantizer
from vqprior.functional import rotation_trick, select_codes, straight_through

# The defaults of the other package, used on both sides.
DECAY, COMMITMENT = 0.8, 1.0
SPREAD = 0.3  # of tokens around their codes, small enough to avoid ties


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens ``x`` ``(1, n, d)``, the incoming gradient, and codebooks ``(q, k, d)``."""

    x: Tensor
    direction: Tensor
    codes: Tensor


class Outcome(NamedTuple):
    """The results of a step; None where a side has no such result."""

    indices: Tensor
    quantized: Tensor
    loss: Tensor | None = None
    grad: Tensor | None = None
    codes: Tensor | None = None


Step = Callable[[], Any]


def tokens(device: str, n: int, k: int, d: int, q: int = 1, *, seed: int = 0) -> Tokens:
    """Returns tokens around sums of codes; each stage's codes are half as long."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [
        0.5 ** min(stage, 7) for stage in range(q)
    ]  # at least 2**-7, to avoid denormal numbers
    codes = torch.stack([length * torch.randn(k, d, generator=generator) for length in lengths])
    x = SPREAD * lengths[-1] * torch.randn(n, d, generator=generator)
    for table in codes:
        x += table[torch.randint(k, (n,), generator=generator)]
    direction = torch.randn(1, n, d, generator=generator)
    return Tokens(x.unsqueeze(0).to(device), direction.to(device), codes.to(device))


def plain(codes: Tensor, *, rotation: bool = False) -> VectorQuantizer:
    """Returns a quantizer with these codes ``(k, d)``."""
    k, d = codes.shape
    estimator = rotation_trick if rotation else straight_through
    table = EmbeddingCodebook.from_codes(codes)
    return VectorQuantizer(d, k, codebook=table, estimator=estimator, commitment_weight=COMMITMENT)


def ours(data: Tokens, *, rotation: bool = False) -> Quantizer:
    """Returns our quantizer, with a stage for each codebook."""
    stages = [plain(codes, rotation=rotation) for codes in data.codes]
    return stages[0] if len(stages) == 1 else ResidualQuantizer(stages)


def train_ours(quantizer: Quantizer, x: Tensor, direction: Tensor) -> Step:
    """Returns a step: forward, backward, and the moving average."""
    rule = CodebookEMA(quantizer, decay=DECAY)
    leaf = x.detach().requires_grad_()

    def step() -> Outcome:
        leaf.grad = None
        out = quantizer(leaf)
        ((out.quantized * direction).sum() + out.loss).backward()
        rule.step(out)
        codes = quantizer.codebooks[0].codes()
        return Outcome(out.indices, out.quantized.detach(), out.loss.detach(), leaf.grad, codes)

    return step


def evaluate_ours(quantizer: Quantizer, x: Tensor) -> Step:
    """A call in eval, without gradients."""
    quantizer.eval()

    @torch.no_grad()
    def step() -> Outcome:
        out = quantizer(x)
        return Outcome(out.indices, out.quantized)

    return step


def theirs(data: Tokens, *, rotation: bool = False) -> Any:
    """Returns the other package's quantizer with the same codes and otherwise its defaults."""
    package, (q, k, d) = peer.load(), data.codes.shape
    options = {"decay": DECAY, "commitment_weight": COMMITMENT, "rotation_trick": rotation}
    if q == 1:
        quantizer = package.VectorQuantize(dim=d, codebook_size=k, **options)
    else:
        quantizer = package.ResidualVQ(dim=d, num_quantizers=q, codebook_size=k, **options)
    for layer, codes in zip([quantizer] if q == 1 else quantizer.layers, data.codes, strict=True):
        layer.codebook = codes
        layer._codebook.embed_avg.copy_(codes)  # its counts start at 1, as ours
    return quantizer.to(data.x.device)


def train_theirs(quantizer: Any, x: Tensor, direction: Tensor) -> Step:
    """Returns a step: forward, which includes the moving average, and backward."""
    quantizer.train()
    first = quantizer.layers[0] if hasattr(quantizer, "layers") else quantizer
    leaf = x.detach().requires_grad_()

    def step() -> Outcome:
        leaf.grad = None
        quantized, indices, losses = quantizer(leaf)
        loss = losses.mean()  # over stages, as ours
        ((quantized * direction).sum() + loss).backward()
        return Outcome(indices, quantized.detach(), loss.detach(), leaf.grad, first.codebook)

    return step


def evaluate_theirs(quantizer: Any, x: Tensor) -> Step:
    """A call in eval, without gradients."""
    quantizer.eval()

    @torch.no_grad()
    def step() -> Outcome:
        quantized, indices, _ = quantizer(x)
        return Outcome(indices, quantized)

    return step


def choices(device: str, n: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits ``(n, k)`` that require a gradient, codes ``(k, d)``, incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(*shape, generator=generator) for shape in ((n, k), (k, d), (n, d)))
    logits, codes, direction = (tensor.to(device) for tensor in made)
    return logits.mul_(2).requires_grad_(), codes, direction


def select_ours(logits: Tensor, codes: Tensor, direction: Tensor) -> Step:
    """Returns a step: ``select_codes``, forward and backward."""
    leaf = logits.detach().requires_grad_()

    def step() -> Outcome:
        leaf.grad = None
        vectors, indices = select_codes(leaf, codes)
        vectors.backward(direction)
        return Outcome(indices, vectors.detach(), grad=leaf.grad)

    return step


def select_textbook(logits: Tensor, codes: Tensor, direction: Tensor) -> Step:
    """Returns a step: a one-hot choice with the gradient of a softmax, as usually written."""
    leaf = logits.detach().requires_grad_()

    def step() -> Outcome:
        leaf.grad = None
        indices = leaf.argmax(dim=-1)
        hard, soft = F.one_hot(indices, leaf.shape[-1]).to(leaf.dtype), leaf.softmax(dim=-1)
        vectors = (hard + soft - soft.detach()) @ codes
        vectors.backward(direction)
        return Outcome(indices, vectors.detach(), grad=leaf.grad)

    return step
