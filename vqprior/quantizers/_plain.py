"""Vector quantization with one codebook."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import (
    check_at_least,
    check_callable,
    check_choice,
    check_floating,
    check_last_dim,
    check_positive,
)
from vqprior._interfaces import Codebook, GradientEstimator, IndexEstimator, Quantizer
from vqprior._results import QuantizerOutput, Selection
from vqprior._transforms import is_learning
from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.functional import nearest_indices, straight_through, unused_code_loss
from vqprior.functional._kernels._host import where_valid
from vqprior.functional._losses import commitment_and_codebook_mse
from vqprior.functional._scores import score_codes
from vqprior.quantizers._shared._inputs import (
    valid_tokens,
    validate_assignment,
    validate_indices,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import make_output


@final
class VectorQuantizer(Quantizer):
    """Replaces each vector by the nearest code of a codebook.

    The codebook learns by gradient with your optimizer, through the ``"codebook"`` and
    ``"unused"`` terms, or by a rule such as those of ``default_rules``; then both terms
    disappear. ``SelfUpdating`` steps the rules for you.

    Args:
        dim: Number of features of one vector.
        codebook_size: Number of codes.
        codebook: The codes; by default an ``EmbeddingCodebook`` with a gain of 8.
        metric: ``"euclidean"``, ``"cosine"`` (compares directions and returns codes at their
            length) or ``"dot"``.
        estimator: A function ``(x, codes) -> codes`` that defines the gradient of the result, or
            an ``IndexEstimator`` such as ``functional.IndexBackpropagation``, whose gradient
            reaches all codes.
        commitment_weight: Weight of ``commitment_loss``, at least 0.
        codebook_weight: Weight of ``codebook_loss``, at least 0. Published code that follows
            the original VQGAN release has a commitment weight of 1 and a codebook weight of
            0.25.
        unused_weight: Weight of ``unused_code_loss`` relative to ``codebook_weight``, at least 0.
            In eval mode there is no such term.

    Raises:
        TypeError: If ``codebook`` is not a ``Codebook`` or ``estimator`` is not callable.
        ValueError: If a size is below 1, ``codebook`` has another size, ``metric`` is unknown,
            or a weight is negative.

    Shape:
        - input: ``(..., d)``
        - output: ``quantized`` ``(..., d)``, ``indices`` ``(...)``

    References:
        van den Oord, Vinyals and Kavukcuoglu, *Neural Discrete Representation Learning*,
        NeurIPS 2017, equations 1 to 3. <https://arxiv.org/abs/1711.00937>

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> vq = VectorQuantizer(dim=64, codebook_size=512)
        >>> out = vq(torch.randn(2, 100, 64))
        >>> out.quantized.shape, out.indices.shape
        (torch.Size([2, 100, 64]), torch.Size([2, 100]))
        >>> torch.equal(vq.decode(out.indices), out.quantized)
        True
        >>> sorted(out.terms)
        ['codebook', 'commitment', 'unused']
    """

    def __init__(  # noqa: PLR0913 (docs/design.md says why)
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook: Codebook | None = None,
        metric: str = "euclidean",
        estimator: GradientEstimator | IndexEstimator = straight_through,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        unused_weight: float = 0.01,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("codebook_size", codebook_size, 1)
        if codebook is not None and not isinstance(codebook, Codebook):
            raise TypeError(
                f"`codebook` must be a Codebook, got {type(codebook).__name__}. For given vectors, "
                "pass `EmbeddingCodebook.from_codes(vectors)`."
            )
        if not isinstance(estimator, IndexEstimator):
            check_callable("estimator", estimator, "For example `functional.straight_through`.")
        self.codebook: Codebook = (
            EmbeddingCodebook(codebook_size, dim, gain=8.0) if codebook is None else codebook
        )
        if (self.codebook.num_codes, self.codebook.dim) != (codebook_size, dim):
            raise ValueError(
                f"`codebook` must hold {codebook_size} codes of {dim} features, got "
                f"{self.codebook.num_codes} of {self.codebook.dim}. Make `dim` and "
                "`codebook_size` those of the codebook."
            )
        check_choice("metric", metric, ("euclidean", "cosine", "dot"))
        check_at_least("commitment_weight", commitment_weight, 0.0)
        check_at_least("codebook_weight", codebook_weight, 0.0)
        check_at_least("unused_weight", unused_weight, 0.0)
        self.metric = metric
        self.estimator = estimator
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.unused_weight = unused_weight

    @property
    def dim(self) -> int:
        """Number of features ``d`` of one vector."""
        return self.codebook.dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """One codebook."""
        return (self.codebook.num_codes,)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """The one codebook."""
        return (self.codebook,)

    @property
    def _learns_from_result(self) -> bool:
        """Whether the estimator reaches the codebook."""
        learns = any(is_learning(parameter) for parameter in self.codebook.parameters())
        return learns and isinstance(self.estimator, IndexEstimator)

    def _search_space(self) -> tuple[Tensor, str] | None:
        """Returns the codes and the metric, unless another module or the estimator has a part.

        Codes that a module computes are computed once a call, in ``forward``.
        """
        if isinstance(self.estimator, IndexEstimator) or not self.codebook.can_be_set:
            return None
        return self.codebook.codes(), self.metric

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return (
            f"metric={self.metric!r}, commitment_weight={self.commitment_weight}, "
            f"codebook_weight={self.codebook_weight}, unused_weight={self.unused_weight}"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If the last dimension of ``x`` is not ``dim``, or ``mask`` has another
                shape than the tokens.
        """
        x, valid = validate_input(x, mask, self.dim)
        warn_of_channels_first(self, x)
        return self._result(x, valid, None)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of the nearest code of each vector: ``(..., d) -> (...)``."""
        valid = valid_tokens(x, mask, self.dim)
        # What does not count gets some index, so there is no copy of `x` to blank it.
        nearest = nearest_indices(x, self.codebook.codes(), metric=self.metric)
        return where_valid(valid, nearest, -1)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes named by ``indices``: ``(...) -> (..., d)``; -1 gives zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If an index on the CPU names no code.
        """
        validate_indices(indices, self.codebook_sizes)
        codes = F.embedding(indices.long().clamp_min(0), self.codebook.codes())
        return torch.where((indices >= 0).unsqueeze(-1), codes, 0.0)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result for indices ``(...)`` chosen elsewhere.

        Raises:
            TypeError: If ``x`` is not floating point or ``indices`` not an integer tensor.
            ValueError: On a wrong shape.
        """
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        return self._result(x, valid, indices.long().clamp_min(0))

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns how well each code fits each vector: ``(..., d) -> (..., k)``.

        Minus the squared distance, the cosine, or the dot product, divided by ``temperature``;
        float32 or wider, up to a constant for each vector. For index prediction and soft
        assignment; stores ``n`` x ``k`` numbers. ``indices`` change nothing: there is one choice.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``temperature`` is not greater than 0, or on a wrong shape.
        """
        check_floating("x", x)
        check_last_dim("x", x, self.dim)
        check_positive("temperature", temperature)
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = self.codebook.codes().to(dtype)
        return score_codes(x.to(dtype), vectors, self.metric) / temperature

    @torch.no_grad()
    def nearest_indices(self, x: Tensor, num_nearest: int) -> Tensor:
        """Returns the indices of the nearest codes, nearest first: ``(..., d) -> (..., m)``.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: On a wrong shape, or if ``num_nearest`` is not between 1 and ``k``.
        """
        vectors = self.codebook.codes()
        found = nearest_indices(x, vectors, metric=self.metric, num_nearest=num_nearest)
        return found if num_nearest > 1 else found.unsqueeze(-1)

    def _result(self, x: Tensor, valid: Tensor, chosen: Tensor | None) -> QuantizerOutput:
        """Looks up the codes that were chosen, or the nearest, and defines their gradient."""
        vectors = self.codebook.codes()
        if isinstance(self.estimator, IndexEstimator):
            selected, chosen = self.estimator.select(
                x, vectors, metric=self.metric, indices=chosen, sample=self.training
            )
            codes = where_valid(valid, F.embedding(chosen, vectors), 0.0)
            quantized = where_valid(valid, selected.to(x.dtype), 0.0)
        else:
            if chosen is None:
                chosen = nearest_indices(x, vectors, metric=self.metric)
            codes = where_valid(valid, F.embedding(chosen, vectors), 0.0)
            quantized = self.estimator(x, codes.to(x.dtype))
            if self.estimator is not straight_through:  # which returns the zeros it is given
                quantized = where_valid(valid, quantized, 0.0)
        indices = where_valid(valid, chosen, -1)
        selection = Selection(inputs=x, codes=codes, indices=indices, mask=valid)
        return make_output(quantized, indices, self._terms(selection, vectors), (selection,))

    def _terms(self, selection: Selection, vectors: Tensor) -> dict[str, Tensor]:
        # FSDP1 may have taken the parameters away, but codes have a gradient all the same.
        learns = is_learning(vectors) or any(is_learning(p) for p in self.codebook.parameters())
        weights = {"commitment": self.commitment_weight}
        weights["codebook"] = self.codebook_weight if learns else 0.0
        # A loss without weight must not reach what it would train, not even by a zero.
        inputs = selection.inputs if weights["commitment"] > 0 else selection.inputs.detach()
        codes = selection.codes if weights["codebook"] > 0 else selection.codes.detach()
        losses = zip(
            weights.items(), commitment_and_codebook_mse(inputs, codes, selection.mask), strict=True
        )
        terms = {name: weight * loss for (name, weight), loss in losses if weight > 0}
        weight = self.unused_weight * self.codebook_weight
        # Where codes share parameters, the pull on one would move them all.
        if learns and weight > 0 and self.codebook.can_be_set and self.training:
            terms["unused"] = weight * unused_code_loss(selection, vectors)
        return terms
