"""Random-projection quantization: fixed labels for masked prediction."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_at_least
from vqprior._interfaces import Codebook, Quantizer
from vqprior._precision import KeepsDtypes, without_autocast
from vqprior._results import QuantizerOutput
from vqprior.functional import nearest_indices, straight_through
from vqprior.quantizers._shared._inputs import (
    validate_assignment,
    validate_indices,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import make_output


@final
class RandomProjectionQuantizer(KeepsDtypes, Quantizer):
    """Labels vectors with the random code nearest in cosine to a random projection.

    Use the indices as labels for masked prediction; nothing is learned. Normalize each feature
    over the data first (mean 0, standard deviation 1), otherwise few codes are used. ``decode``
    returns the shortest vectors whose projections are the codes. Projection and codes are
    buffers that stay float32 when the module is cast.

    Args:
        dim: Number of features of one vector, at least 1.
        codebook_size: Number of codes, at least 1.
        code_dim: Number of features of one code, between 1 and ``dim``.
        generator: Random number generator of projection and codes; by default the global one.

    Raises:
        ValueError: If a size is out of range.

    Shape:
        - input: ``(..., d)``
        - output: ``quantized`` ``(..., d)``, ``indices`` ``(...)``

    References:
        Chiu et al., *Self-supervised Learning with Random-projection Quantizer for Speech
        Recognition*, ICML 2022, section 3.1. <https://arxiv.org/abs/2202.01855>

    Examples:
        >>> import torch
        >>> from vqprior import RandomProjectionQuantizer
        >>> labels = RandomProjectionQuantizer(80, 8192).encode(torch.randn(2, 100, 80))
        >>> labels.shape
        torch.Size([2, 100])
    """

    projection: Tensor
    codes: Tensor
    back: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        code_dim: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("codebook_size", codebook_size, 1)
        check_at_least("code_dim", code_dim, 1)
        if code_dim > dim:
            raise ValueError(f"`code_dim` must be at most `dim`, {dim}, got {code_dim}.")
        bound = (6 / (dim + code_dim)) ** 0.5  # Xavier's uniform distribution
        uniform = torch.rand(dim, code_dim, generator=generator, dtype=torch.float32)
        projection = (2 * uniform - 1) * bound
        codes = torch.randn(codebook_size, code_dim, generator=generator, dtype=torch.float32)
        self.register_buffer("projection", projection)
        self.register_buffer("codes", F.normalize(codes, dim=1))
        with without_autocast(projection.device.type):
            self.register_buffer("back", torch.linalg.pinv(projection))

    @property
    def dim(self) -> int:
        """Number of features ``d`` of one vector."""
        return self.projection.shape[0]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """One codebook."""
        return (self.codes.shape[0],)

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Empty: nothing is learned."""
        return ()

    def extra_repr(self) -> str:
        """Shows the sizes in ``repr``."""
        return f"{self.dim}, {self.codebook_size}, code_dim={self.codes.shape[1]}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x`` or ``mask`` has the wrong shape.
        """
        indices = self.encode(x, mask)
        warn_of_channels_first(self, x)
        return self.quantize_as(x, indices)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the index of the code with the nearest direction: ``(..., d) -> (...)``."""
        x, valid = validate_input(x, mask, self.dim)
        nearest = nearest_indices(self._projected(x), self.codes, metric="cosine")
        return torch.where(valid, nearest, -1)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the vectors for ``indices``: ``(...) -> (..., d)``; -1 decodes to zeros.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If an index on the CPU names no code.
        """
        validate_indices(indices, self.codebook_sizes)
        codes = F.embedding(indices.long().clamp_min(0), self.codes)
        with without_autocast(codes.device.type):
            vectors = codes @ self.back
        return torch.where((indices >= 0).unsqueeze(-1), vectors, 0.0).to(self.dtype)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` had been chosen."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        chosen = torch.where(valid, indices.long(), -1)
        quantized = straight_through(x, self.decode(chosen).to(x.dtype))
        return make_output(quantized, chosen, {})

    def _projected(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Only directions matter: scaled so that a sum cannot overflow.
        largest = wide.abs().amax(dim=-1, keepdim=True)
        with without_autocast(x.device.type):
            return wide / torch.where(largest > 0, largest, 1.0) @ self.projection.to(wide.dtype)
