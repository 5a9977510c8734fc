"""Signs of features by kernels: codes, losses and their gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vqprior.functional import _bit_entropy
from vqprior.functional._kernels import _triton
from vqprior.functional._kernels._bit_plan import MAX_BITS, MAX_GROUP, BitPlan
from vqprior.functional._kernels._operators import is_traced

Results = tuple[Tensor, Tensor | None, Tensor | None]


def can_fuse(x: Tensor, mask: Tensor | None, plan: BitPlan) -> bool:
    """Whether kernels may do all of it."""
    return (
        not is_traced(x)
        and _triton.is_usable(x)
        and (mask is None or mask.device == x.device)
        and plan.bits <= MAX_BITS
        and plan.group <= MAX_GROUP
        and forward_ad._current_level < 0
        # Sums are added up in any order.
        and not torch.are_deterministic_algorithms_enabled()
    )


class FusedBits(torch.autograd.Function):
    """Codes, commitment, entropy and indices, by two kernels and a product for each group."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        mask: Tensor | None,
        plan: BitPlan,
        plain: Callable[[Tensor, Tensor], Results],
        across_ranks: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from vqprior.functional._kernels._triton_bits import bit_losses, sign_bits  # needs Triton

        codes, indices, sums = sign_bits(x, mask, plan)
        if across_ranks:
            _bit_entropy.sum_over_ranks_(sums[2:])
        commitment, entropy, logarithms = bit_losses(sums, plan)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, indices, sums, logarithms)
        ctx.options = plan, plain, across_ranks
        return codes, commitment, entropy, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        from vqprior.functional._kernels._triton_bits import bits_gradient  # needs Triton

        x, indices, sums, logarithms = ctx.saved_tensors
        plan, plain, across_ranks = ctx.options
        of_codes, of_commitment, of_entropy, _ = grads
        if torch.is_grad_enabled():  # for derivatives of higher order
            pairs = zip(plain(x, indices >= 0), grads, strict=False)
            acting = [(one, grad) for one, grad in pairs if one is not None and grad is not None]
            outs, given = zip(*acting, strict=True)
            found = torch.autograd.grad(outs, x, given, create_graph=True)[0]
            return found, None, None, None, None
        if across_ranks and of_entropy is not None:
            of_entropy = _bit_entropy.sum_over_ranks(of_entropy)
        wanted = (of_codes, of_commitment, of_entropy)
        found = bits_gradient(x, indices, sums, logarithms, wanted, plan)
        return found, None, None, None, None
