"""Product quantization: one quantizer for each group of features."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_floating, check_last_dim
from vqprior._interfaces import Codebook, Quantizer
from vqprior._results import QuantizerOutput
from vqprior.functional import nearest_indices
from vqprior.quantizers._shared._columns import mask_indices, stack_logits
from vqprior.quantizers._shared._inputs import (
    check_indices,
    valid_tokens,
    validate_assignment,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import merge_outputs
from vqprior.quantizers._shared._stages import Stages


@final
class GroupedQuantizer(Quantizer):
    """Splits the features into groups and quantizes each with its own quantizer.

    This is product quantization: ``q`` codebooks of ``k`` codes represent ``k ** q`` vectors. A
    token with any non-finite feature is masked as a whole. Loss terms are summed over groups.
    Stored codebooks of equal shape and metric are searched in one batched product.

    Args:
        quantizers: One for each group, in the order of the features. Pass the same one several
            times to share its codebook.

    Raises:
        TypeError: If an entry is not a quantizer.
        ValueError: If ``quantizers`` is empty, or one does not have features last or indices for
            each token.

    Shape:
        - input: ``(..., d)`` with ``d`` the sum of the groups' features
        - output: ``quantized`` ``(..., d)``, ``indices`` ``(..., q)``, or ``(...)`` for one group

    References:
        Jegou, Douze and Schmid, *Product Quantization for Nearest Neighbor Search*, TPAMI 2011,
        section II.B.

    Examples:
        >>> import torch
        >>> from vqprior import GroupedQuantizer, VectorQuantizer
        >>> pq = GroupedQuantizer([VectorQuantizer(dim=4, codebook_size=256) for _ in range(8)])
        >>> pq.dim, pq.bits_per_token
        (32, 64.0)
        >>> pq(torch.randn(2, 10, 32)).indices.shape
        torch.Size([2, 10, 8])
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        super().__init__()
        self.groups = Stages(quantizers)

    @property
    def dim(self) -> int:
        """Sum of ``dim`` over the groups."""
        return sum(self._dims)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codebook sizes of all groups, in order."""
        return self.groups.codebook_sizes

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Codebooks of all groups, in order."""
        return self.groups.codebooks

    @property
    def _learns_from_result(self) -> bool:
        """Whether any group learns from the result."""
        return self.groups._learns_from_result

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x`` or ``mask`` has the wrong shape.
        """
        # Each group masks its own input, which saves a copy of `x` here.
        valid = valid_tokens(x, mask, self.dim)
        warn_of_channels_first(self, x)
        parts, found = x.split(self._dims, dim=-1), self._search(x, valid)
        if found is None:
            outs = [group(part, valid) for group, part in zip(self.groups, parts, strict=True)]
        else:
            triples = zip(self.groups, parts, found, strict=True)
            outs = [group.quantize_as(part, indices) for group, part, indices in triples]
        return self._join(outs)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices ``(..., q)`` of all groups."""
        valid = valid_tokens(x, mask, self.dim)
        found = self._search(x, valid)
        if found is None:
            parts = zip(self.groups, x.split(self._dims, dim=-1), strict=True)
            found = [group.encode(part, valid) for group, part in parts]
        return self.groups.join(found)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes ``(..., d)`` named by ``indices``; -1 decodes to zeros in its group.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If ``indices`` does not have one index per codebook, or one on the CPU
                names no code.
        """
        check_indices(indices, self.num_codebooks)
        parts = zip(self.groups, self.groups.split(indices), strict=True)
        return torch.cat([group.decode(part) for group, part in parts], dim=-1)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` ``(..., q)`` had been chosen; -1 masks a group."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        parts = x.split(self._dims, dim=-1)
        chosen = self.groups.split(mask_indices(indices, valid, self.num_codebooks))
        triples = zip(self.groups, parts, chosen, strict=True)
        return self._join([group.quantize_as(part, ones) for group, part, ones in triples])

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns logits over the codes of each group: ``(..., d) -> (..., q, k)``.

        Raises:
            TypeError: If a group has no explicit codebook.
            ValueError: If ``temperature`` is not greater than 0, or a shape is wrong.
        """
        check_floating("x", x)
        check_last_dim("x", x, self.dim)
        if indices is not None:
            check_indices(indices, self.num_codebooks)
        given = [None] * len(self.groups) if indices is None else self.groups.split(indices)
        triples = zip(self.groups, x.split(self._dims, dim=-1), given, strict=True)
        parts = [g.logits(part, temperature=temperature, indices=i) for g, part, i in triples]
        return stack_logits(parts, self.groups.counts)

    def _search(self, x: Tensor, valid: Tensor) -> list[Tensor] | None:
        """Searches all groups at once; returns None if their shapes or metrics differ."""
        tables: list[Tensor] = []
        metrics: list[str] = []
        for group in self.groups:
            space = group._search_space()
            if space is None or (tables and space[0].shape != tables[0].shape):
                return None
            tables.append(space[0])
            metrics.append(space[1])
        if any(metric != metrics[0] for metric in metrics):
            return None
        codes = torch.stack(tables)
        parts = x.unflatten(-1, (len(codes), codes.shape[2]))
        found = nearest_indices(parts, codes, metric=metrics[0])
        return list(torch.where(valid.unsqueeze(-1), found, -1).unbind(-1))

    @property
    def _dims(self) -> list[int]:
        return [group.dim for group in self.groups]

    def _join(self, outs: list[QuantizerOutput]) -> QuantizerOutput:
        quantized = torch.cat([out.quantized for out in outs], dim=-1)
        return merge_outputs(outs, quantized, self.groups.join([out.indices for out in outs]))
