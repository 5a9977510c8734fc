"""The interfaces that the rest of the library is written against. Read this file first.

Words: a *code* is a vector, an *index* the integer that names it. Letters: ``b`` batch,
``n`` tokens, ``d`` features, ``k`` codes, ``q`` codebooks, ``...`` any leading dimensions.
"""

import abc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vqprior._checks import no_codebook_error
from vqprior._placement import Placed, module_dtype
from vqprior._results import QuantizerOutput

GradientEstimator = Callable[[Tensor, Tensor], Tensor]
"""A function ``(x, codes) -> codes`` that keeps the value and defines the backward pass."""


class Codebook(nn.Module, abc.ABC):
    """``k`` codes of ``d`` features.

    They learn by the user's optimizer, from ``parameters()``, or by an ``UpdateRule``, which
    calls ``set_codes_``. ``CodebookEMA`` turns the parameters into buffers of the same names.
    """

    can_be_set: bool = True  # by ``set_codes_``: False where the codes are computed

    @property
    @abc.abstractmethod
    def num_codes(self) -> int:
        """Number of codes ``k``."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Number of features ``d`` of one code."""

    @abc.abstractmethod
    def codes(self) -> Tensor:
        """Returns all codes ``(k, d)``, with the gradient to what learns."""

    @abc.abstractmethod
    def set_codes_(self, codes: Tensor, where: Tensor) -> None:
        """Overwrites with ``codes`` ``(k, d)`` where ``where`` ``(k,)`` is True.

        Raises ``TypeError`` if the codes are computed from something else and cannot be set.
        """

    def _table(self) -> tuple[Tensor, float] | None:
        """Returns a matrix and the number that makes codes of it, where rules may write to it."""
        return None


class IndexEstimator(abc.ABC):
    """A gradient through the choice of a code, which reaches all codes.

    ``VectorQuantizer`` takes it in place of a ``GradientEstimator``.
    """

    @abc.abstractmethod
    def select(
        self,
        x: Tensor,
        codes: Tensor,
        *,
        metric: str,
        indices: Tensor | None = None,
        sample: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Chooses a code ``(k, d)`` for each vector ``(..., d)``: ``(vectors, indices)``.

        ``indices`` are given choices; without them, ``sample`` asks for random choices, if the
        estimator has any.
        """


class QuantizerBase(Placed, abc.ABC):
    """Sizes and codebooks: the part of a quantizer's interface that rules and metrics need."""

    has_index_per_token: bool = True  # (...) or (..., q)
    features_last: bool = True  # the layout of nesting
    _layout_is_known: bool = False  # inside a quantizer that has seen to the layout
    _positions_per_token: float = 1.0  # that have indices: more where a map has several scales

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Number of features ``d`` of one token."""

    @property
    @abc.abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each of the ``q`` indices of a token."""

    @property
    @abc.abstractmethod
    def codebooks(self) -> tuple[Codebook, ...]:
        """The codebook behind each selection of a result; a shared one appears repeatedly."""

    @property
    def codebook_size(self) -> int:
        """Number of codes ``k`` of one index; the largest if they differ."""
        return max(self.codebook_sizes)

    @property
    def num_codebooks(self) -> int:
        """Number of indices ``q`` of one token."""
        return len(self.codebook_sizes)

    @property
    def bits_per_token(self) -> float:
        """Bits that the indices of one token cost without entropy coding."""
        bits = sum(math.log2(size) for size in self.codebook_sizes)
        return bits * self._positions_per_token


class Quantizer(QuantizerBase):
    """Maps each vector of ``d`` features to one of finitely many codes.

    Concrete classes are final: wrap one to change it. All obey these laws, which
    ``vqprior.testing.check_quantizer`` checks for any quantizer:

    1. ``decode(out.indices)`` has the module's ``dtype``. Cast to the dtype of the input, it
       equals ``out.quantized``, bit for bit for lookups.
    2. Calls are pure: no parameter or buffer changes in any call, in training mode either; in
       eval mode no random number is drawn. (``SelfUpdating`` is the declared exception.)
    3. The gradient of ``quantized`` is that of the estimator, the identity by default.
    4. Masked tokens, and tokens with a non-finite feature, contribute nothing to losses, rules
       or metrics. An all-true mask equals no mask; without valid tokens the loss is 0 and
       gradients are finite.
    5. Search and statistics are computed in float32 or wider under autocast, ``.half()`` and
       large offsets; equal scores go to the lowest index; index arithmetic is int64.
    6. Nothing of size ``n`` x ``k`` beyond a bounded block is stored, and nothing depends on a
       tensor's value on the host: ``torch.compile(fullgraph=True)`` and ``torch.export`` work.
    7. ``R`` ranks that call ``rule.step(out)`` behave as one process with the joint batch.
    8. ``state_dict`` loaded strictly into a fresh module, also one built on the meta device,
       continues bit for bit; ``pickle`` and ``deepcopy`` work.
    9. Wrong input raises ``ValueError`` or ``TypeError`` in the form "`argument` must
       <requirement>, got <value>. <The way out.>"
    """

    @abc.abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens."""

    @abc.abstractmethod
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices ``(...)`` or ``(..., q)`` of ``x``, without gradients."""

    @abc.abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes ``(..., d)`` named by ``indices``, in ``dtype``; -1 decodes to zeros.

        Raises ``ValueError`` for other values outside ``[0, codebook_size)`` on the CPU; on a GPU
        the check would force a synchronization.
        """

    @abc.abstractmethod
    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` had been chosen for ``x`` ``(..., d)``.

        For indices from a beam search, a teacher or labels. -1 masks a token.
        """

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns logits over the codes: ``(..., d) -> (..., k)``, or ``(..., q, k)``.

        Quantizers that choose one index after the other take ``indices`` for the earlier choices
        (teacher forcing), by default their own; -1 is a choice not made yet, and adds nothing.
        Raises ``TypeError`` without an explicit codebook.
        """
        raise no_codebook_error(self, "logits")

    def nearest_indices(self, x: Tensor, num_nearest: int) -> Tensor:
        """Returns the nearest indices, nearest first, without gradients: ``(..., d) -> (..., m)``.

        Raises ``TypeError`` unless the quantizer has exactly one explicit codebook.
        """
        raise no_codebook_error(self, "nearest_indices")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that ``decode`` returns: that of the module, for what follows it in a model.

        The widest dtype of its floating parameters and buffers. Without any, the one of the last
        ``.to(dtype)``, ``.half()`` or the like, and before torch's default dtype.
        """
        return module_dtype(self)

    @property
    def _learns_from_result(self) -> bool:
        """Whether a parameter may get a gradient from ``quantized``, as those of a module do."""
        return True

    def _search_space(self) -> tuple[Tensor, str] | None:
        """Returns codes ``(k, d)`` and metric if ``encode`` only chooses the nearest code."""
        return None

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput: ...
