"""Gradient estimators: functions ``(x, codes) -> codes`` that define the backward pass."""

from torch import Tensor

from vqprior._checks import check_shape


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """Returns ``codes``, with the gradient of the identity with respect to ``x``.

    The value is ``codes`` bit for bit: ``x - x.detach()`` is exactly zero for finite ``x``,
    whereas the common ``x + (codes - x).detach()`` rounds twice.

    Args:
        x: Vectors before quantization, finite.
        codes: Their codes; no gradient flows to them.

    Returns:
        A tensor equal to ``codes`` whose gradient flows to ``x`` unchanged.

    Raises:
        ValueError: If the shapes differ.

    Shape:
        - ``x``, ``codes``, returns: ``(..., d)``

    References:
        Bengio, Leonard and Courville, *Estimating or Propagating Gradients Through
        Stochastic Neurons*, 2013. <https://arxiv.org/abs/1308.3432>

    Examples:
        >>> import torch
        >>> from vqprior.functional import straight_through
        >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> straight_through(x, x.round()).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    check_shape("codes", codes, x.shape)
    return codes.detach() + (x - x.detach())
