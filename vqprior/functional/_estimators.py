"""Gradient estimators: functions ``(x, codes) -> codes`` that define the backward pass."""

from typing import Any

import torch
from torch import Tensor

from vqprior._checks import check_floating, check_positive, check_shape, check_tensor
from vqprior._transforms import with_batch_of
from vqprior.functional._kernels._operators import apply, with_signature


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """Straight-through estimator: returns ``codes`` and passes the gradient to ``x`` unchanged.

    The value equals ``codes`` bit for bit, unlike the common ``x + (codes - x).detach()``, which
    rounds twice.

    Args:
        x: Vectors before quantization.
        codes: The chosen codes; no gradient flows to them.

    Returns:
        A copy of ``codes`` whose gradient flows to ``x`` unchanged.

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
    check_tensor("x", x)
    check_tensor("codes", codes)
    check_shape("codes", codes, x.shape)
    passed: Tensor = apply(_PassGradient, x, codes.detach())
    return passed


@with_signature
class _PassGradient(torch.autograd.Function):
    """One pass over memory forward and none backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor) -> Tensor:
        return with_batch_of(x, codes.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return grad, None

    @staticmethod
    def tangent(ctx: Any, tangent: Tensor, of_codes: Tensor) -> Tensor:  # noqa: ANN401
        return tangent.to(of_codes.dtype, copy=True)


def rotation_trick(x: Tensor, codes: Tensor, *, max_gain: float | None = None) -> Tensor:
    """Rotation trick: returns ``codes``, with the gradient of rotating and rescaling ``x``.

    The value equals ``codes`` bit for bit. Let ``u``, ``q`` and ``w`` be the unit vectors of
    ``x``, of its code and of ``u + q``. The gradient is that of
    ``gain * (x - 2 w <w, x> + 2 q <u, x>)`` with ``gain = |code| / |x|``, where ``u``, ``q``,
    ``w`` and ``gain`` are constants. Computed in float32 or wider.

    The gradient is finite for every finite ``x``. There is no rotation if ``x`` and its code are
    opposite or one of them is zero. If ``x`` is zero, the gain is 1, so the gradient is the
    straight-through one. The gain never exceeds the square root of the largest number of the
    dtype of ``x`` (256 in float16, 1.8e19 in bfloat16 and float32).

    Args:
        x: Vectors before quantization, finite.
        codes: The chosen codes; no gradient flows to them.
        max_gain: Upper bound of the gain, greater than 0. Without it, a vector much shorter than
            its code gets an amplified gradient; 1 prevents any amplification.

    Returns:
        A copy of ``codes`` whose gradient flows to ``x``, rotated and rescaled.

    Raises:
        TypeError: If ``x`` or ``codes`` is not floating point.
        ValueError: If the shapes differ or ``max_gain`` is not greater than 0.

    Shape:
        - ``x``, ``codes``, returns: ``(..., d)``

    References:
        Fifty et al., *Restructuring Vector Quantization with the Rotation Trick*, ICLR 2025,
        algorithm 1; the limits of the gain and the cases without a rotation are additions.
        <https://arxiv.org/abs/2410.06424>

    Examples:
        >>> import torch
        >>> from vqprior.functional import rotation_trick
        >>> x = torch.tensor([2.0, 0.0], requires_grad=True)
        >>> y = rotation_trick(x, torch.tensor([0.0, 1.0]))  # a quarter turn, half the length
        >>> y.backward(torch.tensor([1.0, 1.0]))
        >>> x.grad.round(decimals=3)
        tensor([ 0.5000, -0.5000])

        As the estimator of a quantizer, without amplification:

        >>> import functools
        >>> from vqprior import VectorQuantizer
        >>> estimator = functools.partial(rotation_trick, max_gain=1.0)
        >>> vq = VectorQuantizer(dim=4, codebook_size=16, estimator=estimator)
    """
    check_floating("x", x)
    check_floating("codes", codes)
    check_shape("codes", codes, x.shape)
    if max_gain is not None:
        check_positive("max_gain", max_gain)
    # A larger gain could overflow the gradient in `x.dtype`.
    bound = torch.finfo(x.dtype).max ** 0.5
    bound = bound if max_gain is None else min(bound, max_gain)
    rotated: Tensor = apply(_RotateGradient, x, codes.detach(), bound)
    return rotated


@with_signature
class _RotateGradient(torch.autograd.Function):
    """Saves only vectors and codes; the rotation is computed in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, max_gain: float) -> Tensor:
        return with_batch_of(x, codes.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        x, codes, ctx.max_gain = inputs
        ctx.save_for_backward(x, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        x, codes = (saved.detach() for saved in ctx.saved_tensors)
        return _rotate(grad, x, codes, ctx.max_gain, back=True).to(x.dtype), None, None

    @staticmethod
    def tangent(ctx: Any, tangent: Tensor, of_codes: Tensor, _: None) -> Tensor:  # noqa: ANN401
        x, codes = (saved.detach() for saved in ctx.saved_tensors)
        return _rotate(tangent, x, codes, ctx.max_gain, back=False).to(codes.dtype)


def _rotate(vectors: Tensor, x: Tensor, codes: Tensor, max_gain: float, *, back: bool) -> Tensor:
    """Rotates and rescales vectors as ``x`` into its code, or by the transpose of this map."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    u, x_peak, x_length = _unit(x.to(dtype))
    q, code_peak, code_length = _unit(codes.to(dtype))
    between = u + q
    length = torch.linalg.vector_norm(between, dim=-1, keepdim=True)
    # Below this length, the direction of the sum is rounding noise.
    turns = (length > torch.finfo(dtype).eps ** 0.5) & (x_peak > 0)
    gain = code_peak / x_peak * (code_length / x_length)
    gain = torch.where(x_peak > 0, gain, 1.0).clamp_max(max_gain)
    wide = vectors.to(dtype)
    start, end = (q, u) if back else (u, q)
    along_w = (between * wide).sum(dim=-1, keepdim=True)
    along_start = (start * wide).sum(dim=-1, keepdim=True)
    # The two terms of the rotation besides the identity; `between` is `length` * w.
    reflect = torch.where(turns, -2 * gain * along_w / length.square(), 0.0)
    forward = torch.where(turns, 2 * gain * along_start, 0.0)
    return (wide * gain).addcmul_(between, reflect).addcmul_(end, forward)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns unit vectors and the length as two factors, whose product may overflow; 0 stays 0."""
    peak = torch.maximum(vectors.amax(dim=-1, keepdim=True), -vectors.amin(dim=-1, keepdim=True))
    scaled = vectors / torch.where(peak > 0, peak, 1.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    length = torch.where(peak > 0, length, 1.0)
    return scaled.div_(length), peak, length
