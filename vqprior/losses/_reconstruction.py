"""Weighted sum of pixel, perceptual and adversarial losses."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqprior._checks import check_shape
from vqprior.losses._adaptive_weight import adaptive_weight

_DEFAULT_WEIGHTS = {"pixel": 1.0, "perceptual": 1.0, "adversarial": 0.75}


@final
class ReconstructionAwareLoss(nn.Module):
    """Reconstruction-aware objective: pixel, perceptual and adversarial losses on images.

    It sees only images, so it works with any decoder, quantizer or index predictor. Each term is
    a callable; a term that is None or has weight 0 is neither computed nor reported.

    With ``reference``, the adversarial term is also multiplied by ``adaptive_weight``: the norm of
    its gradient at that parameter becomes ``weights["adversarial"]`` times that of the other terms
    together. The reference is not registered as a parameter of this module.

    Terms that are modules become submodules, including the discriminator of an
    ``AdversarialLoss``. ``weights`` is a plain dict that you may change between calls, for example
    to start the adversarial term later.

    Args:
        pixel: ``(reconstruction, target) -> scalar``, called in float32 or wider.
        perceptual: ``(reconstruction, target) -> scalar``, such as ``FilterBankLoss`` or
            ``PerceptualLoss``.
        adversarial: ``(reconstruction) -> scalar``, such as ``AdversarialLoss``.
        weights: Factors by name, finite and at least 0; names left out keep the defaults
            ``pixel=1.0``, ``perceptual=1.0`` and ``adversarial=0.75``.
        reference: Trainable weight that every term depends on, at best the last one: that of the
            last layer of the decoder, or of the predictor if the decoder is frozen. None keeps
            the adversarial weight constant.

    Raises:
        ValueError: If ``weights`` has an unknown name, or a weight that is negative or not
            finite.

    Shape:
        - ``reconstruction``, ``target``: the same, any that the terms accept
        - returns: ``(loss, terms)``, where ``terms`` maps ``"pixel"``, ``"perceptual"`` and
          ``"adversarial"`` to weighted float32 scalars, and ``loss`` is their sum

    References:
        Esser, Rombach and Ommer, *Taming Transformers for High-Resolution Image Synthesis*,
        CVPR 2021, equations 5 to 7. <https://arxiv.org/abs/2012.09841>

        *Texture Vector-Quantization and Reconstruction Aware Prediction for Generative
        Super-Resolution* (TVQ&RAP), 2025: the weights, and the use for index prediction.
        <https://arxiv.org/abs/2509.23774>

    Examples:
        >>> import torch
        >>> from vqprior.losses import FilterBankLoss, ReconstructionAwareLoss
        >>> objective = ReconstructionAwareLoss(
        ...     perceptual=FilterBankLoss(), weights={"perceptual": 0.1}
        ... )
        >>> reconstruction, target = torch.rand(2, 1, 3, 16, 16).unbind()
        >>> loss, terms = objective(reconstruction, target)
        >>> sorted(terms), torch.equal(loss, terms["pixel"] + terms["perceptual"])
        (['perceptual', 'pixel'], True)
    """

    def __init__(
        self,
        *,
        pixel: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        adversarial: Callable[[Tensor], Tensor] | None = None,
        weights: Mapping[str, float] | None = None,
        reference: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.pixel = pixel
        self.perceptual = perceptual
        self.adversarial = adversarial
        self.weights = {**_DEFAULT_WEIGHTS, **_checked(weights or {})}
        # A tuple, so that nn.Module does not register the parameter.
        self._reference = (reference,)

    def extra_repr(self) -> str:
        """Shows the weights in ``repr``."""
        return f"weights={self.weights}"

    def forward(self, reconstruction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms.

        Raises:
            ValueError: If the shapes differ, or a term is not a scalar.
        """
        check_shape("target", target, reconstruction.shape)
        terms: dict[str, Tensor] = {}
        if self.weights["pixel"] > 0:
            value = self.pixel(_wide(reconstruction), _wide(target))
            terms["pixel"] = self.weights["pixel"] * _scalar("pixel", value)
        if self.perceptual is not None and self.weights["perceptual"] > 0:
            value = self.perceptual(reconstruction, target)
            terms["perceptual"] = self.weights["perceptual"] * _scalar("perceptual", value)
        if self.adversarial is not None and self.weights["adversarial"] > 0:
            value = _scalar("adversarial", self.adversarial(reconstruction))
            weight = self.weights["adversarial"] * self._balance(_sum(terms, value.device), value)
            terms["adversarial"] = weight * value
        return _sum(terms, reconstruction.device), terms

    def _balance(self, total: Tensor, adversarial: Tensor) -> Tensor | float:
        """Returns the adaptive weight if there is a reference, otherwise 1."""
        (reference,) = self._reference
        return 1.0 if reference is None else adaptive_weight(total, adversarial, reference)

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any; callers deserve the real type.

        def __call__(
            self, reconstruction: Tensor, target: Tensor
        ) -> tuple[Tensor, dict[str, Tensor]]: ...


def _checked(weights: Mapping[str, float]) -> dict[str, float]:
    """Validates names and values of the weights."""
    for name, weight in weights.items():
        if name not in _DEFAULT_WEIGHTS:
            known = ", ".join(repr(term) for term in _DEFAULT_WEIGHTS)
            raise ValueError(f"`weights` must have names among {known}, got {name!r}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"`weights[{name!r}]` must be finite and at least 0, got {weight}.")
    return dict(weights)


def _scalar(name: str, value: Tensor) -> Tensor:
    """Checks that a term is a scalar and returns it in float32."""
    if value.ndim != 0:
        raise ValueError(
            f"`{name}` must return a scalar, got shape {tuple(value.shape)}. Reduce it, for "
            "example with `.mean()`."
        )
    return value.float()


def _wide(tensor: Tensor) -> Tensor:
    """Converts to float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(terms: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Sums the terms; 0 without any."""
    return torch.stack(list(terms.values())).sum() if terms else torch.zeros((), device=device)
