"""Index prediction head."""

from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from vqprior._checks import check_at_least, check_floating, check_last_dim


@final
class IndexPredictor(nn.Module):
    """Predicts logits over codes from features: optional body, layer norm, linear layer.

    Train it with ``functional.index_cross_entropy``, or select code vectors by its logits with
    ``functional.select_codes`` and train it on a loss of these.

    Args:
        dim: Number of features ``d``, at least 1.
        codebook_size: Number of codes ``k``, at least 1.
        num_codebooks: Number of indices ``q`` per token, at least 1.
        body: Module ``(..., d) -> (..., d)`` that is applied first; by default none.

    Raises:
        ValueError: If a size is below 1.

    Shape:
        - input: ``(..., d)``
        - output: ``(..., k)``, or ``(..., q, k)`` if ``num_codebooks`` is above 1

    References:
        Li et al., *Texture Vector-Quantization and Reconstruction Aware Prediction for
        Generative Super-Resolution*, ICLR 2026. <https://arxiv.org/abs/2509.23774>

    Examples:
        >>> import torch
        >>> from vqprior import IndexPredictor
        >>> IndexPredictor(64, 512)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 512])
        >>> IndexPredictor(64, 512, num_codebooks=4)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 4, 512])
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int = 1,
        body: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("codebook_size", codebook_size, 1)
        check_at_least("num_codebooks", num_codebooks, 1)
        self.dim = dim
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.body = nn.Identity() if body is None else body
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_codebooks * codebook_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the logits of all codes.

        Raises:
            TypeError: If ``features`` is not floating point.
            ValueError: If the last dimension of ``features`` is not ``dim``.
        """
        check_floating("features", features)
        check_last_dim("features", features, self.dim)
        logits: Tensor = self.head(self.norm(self.body(features)))
        if self.num_codebooks == 1:
            return logits
        return logits.reshape(*logits.shape[:-1], self.num_codebooks, self.codebook_size)

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(self, features: Tensor) -> Tensor: ...
