"""The weight that balances an adversarial loss against a reconstruction loss."""

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
    """Weighs two losses so that their gradients at one parameter are equally long.

    The weight is ``|d reconstruction_loss| / (|d adversarial_loss| + eps)``, clamped to
    ``[0, max_weight]``. It is always finite: where the ratio is not a number, it is 0. It is a
    constant to autograd, and both graphs are kept for the backward pass that follows.

    Under ``torch.distributed`` squared norms are averaged over the ranks, so every rank gets
    the same weight; every rank must call.

    Where no graph is recorded, in evaluation under ``torch.no_grad()``, gradients and weight
    are 0.

    Args:
        reconstruction_loss: What the adversarial loss is balanced against, a scalar.
        adversarial_loss: The loss to weigh, a scalar.
        parameter: Where the gradients are compared: in VQGAN, the weight of the decoder's last
            layer.
        max_weight: Largest weight, greater than 0.
        eps: Added to the length of the adversarial gradient, greater than 0.

    Returns:
        The factor for ``adversarial_loss``, a float32 scalar.

    Raises:
        ValueError: If a loss is not a scalar, ``parameter`` does not require gradients or does
            not take part in one of the losses, or ``max_weight`` or ``eps`` is not greater
            than 0.

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
            "`parameter` must require gradients, got one that does not. Pass a trained weight "
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
    """The squared length of the gradient of ``loss`` at ``parameter``, in float32."""
    if not loss.requires_grad:
        return torch.zeros((), device=parameter.device)
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"`parameter` must take part in `{name}`, got one of shape "
            f"{tuple(parameter.shape)} that does not. Pass a trained weight between the codes "
            "and the reconstruction."
        )
    return gradient.float().square().sum()
