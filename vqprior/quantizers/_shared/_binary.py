"""Base of the quantizers that keep one bit per feature, its sign."""

import abc

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import (
    check_at_least,
    check_floating,
    check_last_dim,
    check_mask,
    check_positive,
)
from vqprior._interfaces import Codebook, Quantizer
from vqprior._results import QuantizerOutput
from vqprior.functional import straight_through
from vqprior.functional._bit_entropy import bit_entropy
from vqprior.functional._kernels._bit_plan import BitPlan
from vqprior.quantizers._shared._columns import mask_indices
from vqprior.quantizers._shared._fused_bits import FusedBits, can_fuse
from vqprior.quantizers._shared._inputs import (
    validate_assignment,
    validate_indices,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import make_output

_MAX_BITS = 62  # so that every index is an int64
_MAX_GROUP = 20


class BinaryQuantizer(Quantizer):
    """Keeps the sign of each feature; subclasses define the input scaling and that of the codes.

    Codes are never listed. Bit ``i`` of an index is the sign of feature ``i``.
    """

    def __init__(
        self,
        num_bits: int,
        *,
        commitment_weight: float,
        sample_entropy_weight: float,
        batch_entropy_weight: float,
        temperature: float,
        group_size: int,
    ) -> None:
        super().__init__()
        check_at_least("num_bits", num_bits, 1)
        if num_bits > _MAX_BITS:
            raise ValueError(
                f"`num_bits` must be at most {_MAX_BITS}, got {num_bits}. For more bits, combine "
                "several in a `GroupedQuantizer`."
            )
        check_at_least("commitment_weight", commitment_weight, 0.0)
        check_at_least("sample_entropy_weight", sample_entropy_weight, 0.0)
        check_at_least("batch_entropy_weight", batch_entropy_weight, 0.0)
        check_positive("temperature", temperature)
        check_at_least("group_size", group_size, 1)
        if group_size > _MAX_GROUP:
            raise ValueError(
                f"`group_size` must be at most {_MAX_GROUP}, got {group_size}. Use smaller "
                "groups: a group of `g` bits has `2**g` codes."
            )
        self.num_bits = num_bits
        self.commitment_weight = commitment_weight
        self.sample_entropy_weight = sample_entropy_weight
        self.batch_entropy_weight = batch_entropy_weight
        self.temperature = temperature
        self.group_size = group_size
        self._set_constant("_strides", lambda: 1 << torch.arange(num_bits))
        self._set_constant("_unnamed", lambda: torch.tensor(-1))
        self._set_constant("_zero", lambda: torch.zeros((), dtype=torch.float32))

    _on_sphere: bool = False  # whether vectors are normalized

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """Absolute value of every feature of a code."""

    @abc.abstractmethod
    def _prepare(self, x: Tensor) -> Tensor:
        """Returns the vectors whose signs are kept, in float32 or wider."""

    @property
    def _factor(self) -> float:
        """Makes log-odds of a bit, if the logit of a code is its negative squared distance."""
        return 4 * self.scale / self.temperature

    @property
    def dim(self) -> int:
        """Number of features, one per bit."""
        return self.num_bits

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """One codebook with all bit patterns."""
        return (2**self.num_bits,)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Empty: nothing is learned."""
        return ()

    @property
    def _learns_from_result(self) -> bool:
        """False: there are no parameters."""
        return False

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return (
            f"{self.num_bits}, commitment_weight={self.commitment_weight}, "
            f"sample_entropy_weight={self.sample_entropy_weight}, "
            f"batch_entropy_weight={self.batch_entropy_weight}, "
            f"temperature={self.temperature}, group_size={self.group_size}"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x`` or ``mask`` has the wrong shape.
        """
        fused = self._fused(x, mask)
        if fused is not None:
            warn_of_channels_first(self, x)
            quantized, commitment, entropy, indices = fused
            return make_output(quantized, indices, self._acting(commitment, entropy))
        x, valid = validate_input(x, mask, self.dim)
        warn_of_channels_first(self, x)
        prepared = self._prepare(x)
        bits = _bits(prepared)
        indices = self._index(bits, valid)
        return self._output(prepared, self._codes(bits, valid), indices, valid, x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of each vector: ``(..., d) -> (...)``."""
        fused = self._fused(x, mask, losses=False)
        if fused is not None:
            return fused[-1]
        x, valid = validate_input(x, mask, self.dim)
        return self._index(_bits(self._prepare(x)), valid)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the codes named by ``indices``: ``(...) -> (..., d)``; -1 decodes to zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If an index on the CPU names no code.
        """
        validate_indices(indices, self.codebook_sizes)
        named = indices.long().clamp_min(0).unsqueeze(-1)
        bits = (named & self._constant("_strides", indices.device)) > 0
        return self._codes(bits, indices >= 0)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` ``(...)`` had been chosen."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        indices = mask_indices(indices, valid, 1)
        return self._output(self._prepare(x), self.decode(indices), indices, valid, x.dtype)

    def _index(self, bits: Tensor, valid: Tensor) -> Tensor:
        joined = (bits * self._constant("_strides", bits.device)).sum(dim=-1)
        return torch.where(valid, joined, self._constant("_unnamed", bits.device))

    def _codes(self, bits: Tensor, valid: Tensor) -> Tensor:
        """Returns the codes of bits; those of invalid tokens, whose bits are 0, are 0."""
        zero = self._constant("_zero", bits.device)
        zero = zero.to(torch.promote_types(self.dtype, torch.float32))
        twice = torch.add(zero, bits, alpha=2 * self.scale)
        return torch.add(twice, valid.unsqueeze(-1), alpha=-self.scale).to(self.dtype)

    def _output(
        self, prepared: Tensor, codes: Tensor, indices: Tensor, valid: Tensor, dtype: torch.dtype
    ) -> QuantizerOutput:
        terms, count = {}, valid.sum(dtype=prepared.dtype)
        if self.commitment_weight > 0:
            # Invalid tokens are zeros, and so are their codes.
            errors = F.mse_loss(prepared, codes.to(prepared.dtype), reduction="sum")
            terms["commitment"] = errors / (
                count.clamp_min(1) * (self.dim / self.commitment_weight)
            )
        if self.sample_entropy_weight > 0 or self.batch_entropy_weight > 0:
            terms["entropy"] = bit_entropy(
                prepared.reshape(-1, self.dim),
                valid.reshape(-1),
                count,
                min(self.group_size, self.dim),
                factor=self._factor,
                weights=(self.sample_entropy_weight, self.batch_entropy_weight),
                across_ranks=self.training,
            )
        quantized = straight_through(prepared.to(dtype), codes.to(dtype))
        return make_output(quantized, indices, terms)

    def _acting(self, commitment: Tensor, entropy: Tensor) -> dict[str, Tensor]:
        acts = {
            "commitment": self.commitment_weight > 0,
            "entropy": self.sample_entropy_weight > 0 or self.batch_entropy_weight > 0,
        }
        terms = {"commitment": commitment, "entropy": entropy}
        return {name: term for name, term in terms.items() if acts[name]}

    def _fused(
        self, x: Tensor, mask: Tensor | None, *, losses: bool = True
    ) -> tuple[Tensor, ...] | None:
        """Returns codes, commitment, entropy and indices by kernels, or None without them."""
        check_floating("x", x)
        weights = self.commitment_weight, self.sample_entropy_weight, self.batch_entropy_weight
        plan = BitPlan(
            bits=self.num_bits,
            group=min(self.group_size, self.num_bits),
            scale=self.scale,
            factor=self._factor,
            weights=weights if losses else (0.0, 0.0, 0.0),
            sphere=self._on_sphere,
        )
        if self.dtype not in (torch.float32, x.dtype) or not can_fuse(x, mask, plan):
            return None
        check_last_dim("x", x, self.dim)
        if mask is not None:
            check_mask(mask, x.shape[:-1])
        flat_mask = None if mask is None else mask.reshape(-1)
        found = FusedBits.apply(
            x.reshape(-1, self.dim), flat_mask, plan, self._plain, self.training
        )
        return found[0].view(x.shape), *found[1:3], found[3].view(x.shape[:-1])

    def _plain(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, valid = validate_input(x, mask, self.dim)
        prepared = self._prepare(x)
        codes = self._codes(_bits(prepared), valid)
        out = self._output(prepared, codes, valid.long(), valid, x.dtype)
        return out.quantized, out.terms.get("commitment"), out.terms.get("entropy")


def _bits(prepared: Tensor) -> Tensor:
    return prepared.detach() > 0
