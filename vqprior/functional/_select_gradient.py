"""The gradients of a selection by logits: in blocks of the softmax, or by kernels."""

import torch
from torch import Tensor

from vqprior._precision import without_autocast
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._operators import is_traced
from vqprior.functional._location import finite_codes
from vqprior.functional._softmax_gradient import (
    room_for,
    row_blocks,
    soften,
    softmax_gradient,
    write_rows,
)


def select_gradients(  # noqa: PLR0913
    grad: Tensor,
    logits: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: float,
    estimator: str,
    of_logits: bool,  # noqa: FBT001
    of_codes: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    """Computes both gradients; one that is not asked for is empty."""
    (k, d), dtype = codes.shape, torch.promote_types(logits.dtype, torch.float32)
    flat, rows, chosen = logits.reshape(-1, k), grad.reshape(-1, d), indices.reshape(-1)
    by_kernel = of_logits and _fits_kernel(rows, flat, codes, chosen, temperature, estimator)
    grad_codes = codes.new_empty(0, dtype=dtype)
    if of_codes:
        grad_codes = codes.new_zeros(codes.shape, dtype=dtype)
        if estimator != "soft":
            grad_codes = grad_codes.index_add(0, chosen, rows.to(dtype))
    grad_logits, grad_codes = _in_blocks(
        (rows, flat, codes, chosen, temperature, estimator),
        grad_codes,
        of_logits=of_logits and not by_kernel,
        of_codes=of_codes and estimator == "soft",
    )
    if by_kernel:
        from vqprior.functional._kernels._triton_choice_gradient import gradient  # needs Triton

        grad_logits = gradient(rows, flat, codes, chosen, temperature)
    return grad_logits.reshape(logits.shape if of_logits else 0), grad_codes.to(codes.dtype)


def _in_blocks(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, float, str],
    grad_codes: Tensor,
    *,
    of_logits: bool,
    of_codes: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradient of the logits, and adds to that of the codes, in blocks of rows."""
    rows, logits, codes, chosen, temperature, estimator = inputs
    if not (of_logits or of_codes):
        return logits.new_empty(0), grad_codes
    blocks = row_blocks(len(logits), len(codes), logits.device)
    grad_logits = room_for(blocks if of_logits else [], *logits.shape, like=logits)
    dtype = grad_codes.dtype
    wide = rows.to(dtype)
    # A probability of 0 times infinity would be NaN.
    table = finite_codes(codes).to(dtype) if of_logits else codes
    with without_autocast(logits.device.type):
        for part in blocks:
            of_part = logits[part].to(dtype)
            probabilities = soften(of_part, temperature)
            if of_codes:
                grad_codes = grad_codes + probabilities.T @ wide[part]
            if of_logits:
                wanted = wide[part] @ table.T
                found = softmax_gradient(
                    of_part, probabilities, chosen[part], wanted, temperature, estimator
                )
                grad_logits = write_rows(grad_logits, part, found.to(logits.dtype))
    return grad_logits, grad_codes


def _fits_kernel(
    grad: Tensor,
    logits: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: float,
    estimator: str,
) -> bool:
    """Whether kernels can compute the gradient of the logits, which then has no gradient itself."""
    differentiated = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (grad, logits, codes)
    )
    return (
        estimator != "reinmax"  # whose midpoint holds the sampled code as well
        and not isinstance(temperature, Tensor)  # which would have to be read back
        and not differentiated
        and _triton.is_usable(grad, logits, codes, indices)
        and not is_traced(grad.detach(), logits.detach(), codes.detach())
    )


select_gradients_op = torch.library.custom_op(
    "vqprior::select_gradients", select_gradients, mutates_args=()
)


@select_gradients_op.register_fake
def _(  # noqa: PLR0913
    grad: Tensor,
    logits: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: float,
    estimator: str,
    of_logits: bool,  # noqa: FBT001
    of_codes: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape if of_logits else 0), codes.new_empty(
        codes.shape if of_codes else 0
    )
