"""Adaptive weight of an adversarial loss, as in VQGAN."""

import torch
from torch import Tensor

from vqprior._checks import check_positive, check_shape
from vqprior._distributed import all_reduce_sum_, world_size


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    parameter: Tensor,
    *,
    max_weight: float = 1e4,
    eps: float = 1e-4,
) -> Tensor:
    """Computes the VQGAN weight that balances an adversarial and a reconstruction loss.

    The weighted adversarial loss has the same gradient norm at ``parameter`` as the reconstruction
    loss. The weight is ``|d reconstruction_loss| / (|d adversarial_loss| + eps)``, clamped to
    ``[0, max_weight]``, and 0 if the ratio is NaN. It carries no gradient. Both graphs are kept for
    your backward pass.

    Under ``torch.distributed`` squared norms are averaged over ranks, so all ranks get the same
    weight; every rank must call. Under ``torch.no_grad()`` the weight is 0.

    Args:
        reconstruction_loss: Loss to balance against, a scalar.
        adversarial_loss: Loss to be weighted, a scalar.
        parameter: Parameter at which gradients are compared: in VQGAN, the weight of the
            decoder's last layer.
        max_weight: Largest weight, greater than 0.
        eps: Added to the norm of the adversarial gradient, greater than 0.

    Returns:
        The factor for ``adversarial_loss``, a float32 scalar.

    Raises:
        ValueError: If a loss is not a scalar, ``parameter`` does not require gradients or is not
            used by one of the losses, or ``max_weight`` or ``eps`` is not greater than 0.

    Shape:
        - ``reconstruction_loss``, ``adversarial_loss``: ``()``
        - ``parameter``: any
        - returns: ``()``

    References:
        Esser, Rombach and Ommer, *Taming Transformers for High-Resolution Image Synthesis*,
        CVPR 2021, equation 7; the clamp and ``eps`` are those of the authors' code, which gives
        each rank its own weight. <https://arxiv.org/abs/2012.09841>

    Examples:
        >>> import torch
        >>> from vqprior.losses import adaptive_weight
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> adaptive_weight(w.square().sum(), 0.5 * w.sum(), w, eps=1e-8)
        tensor(14.1421)
    """
    check_shape("reconstruction_loss", reconstruction_loss, ())
    check_shape("adversarial_loss", adversarial_loss, ())
    check_positive("max_weight", max_weight)
    check_positive("eps", eps)
    if not parameter.requires_grad:
        raise ValueError(
            "`parameter` must require gradients, got one that does not. Pass a trainable weight "
            "between the codes and the reconstruction."
        )
    squares = torch.stack(
        [
            _squared_gradient("reconstruction_loss", reconstruction_loss, parameter),
            _squared_gradient("adversarial_loss", adversarial_loss, parameter),
        ]
    )
    length, adversarial_length = (all_reduce_sum_(squares) / world_size()).sqrt().unbind()
    ratio = length / (adversarial_length + eps)
    return ratio.nan_to_num(nan=0.0, posinf=max_weight).clamp(0.0, max_weight)


def _squared_gradient(name: str, loss: Tensor, parameter: Tensor) -> Tensor:
    """Returns the squared norm of the gradient of ``loss`` at ``parameter``, in float32."""
    if not loss.requires_grad:
        return torch.zeros((), device=parameter.device)
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"`parameter` must be used by `{name}`, got one of shape {tuple(parameter.shape)} that "
            "is not. Pass a trainable weight between the codes and the reconstruction."
        )
    return gradient.float().square().sum()
