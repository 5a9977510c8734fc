"""Sampling of indices from predicted logits."""

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_logits, check_number
from vqprior.functional._select import gumbel_noise


@torch.no_grad()
def sample_indices(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples one index per token from ``softmax(logits / temperature)``.

    ``top_k`` is applied first, then ``top_p`` to the remaining codes; ties go to the lowest
    index. Excluded codes and codes with a logit of minus infinity are never sampled. Computed in
    float32 or wider, without gradients.

    Args:
        logits: Unnormalized log-probabilities of the codes.
        temperature: Sharpens (below 1) or flattens (above 1) the distribution, at least 0. With
            0, the most likely code is chosen and no random number is drawn.
        top_k: Number of most likely codes to keep, at least 1; by default all.
        top_p: Keeps the smallest set of most likely codes with at least this total probability,
            in ``(0, 1]``; by default all codes.
        generator: Random number generator on the device of ``logits``.

    Returns:
        Indices, as ``int64``.

    Raises:
        TypeError: If ``logits`` is not floating point.
        ValueError: If ``logits`` has no codes, ``temperature`` is negative, ``top_k`` is below
            1 or ``top_p`` is out of range.

    Shape:
        - ``logits``: ``(..., k)``
        - returns: ``(...)``

    References:
        Holtzman et al., *The Curious Case of Neural Text Degeneration*, ICLR 2020, section 3.1
        (``top_p``). <https://arxiv.org/abs/1904.09751>

    Examples:
        >>> import torch
        >>> from vqprior.functional import sample_indices
        >>> logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
        >>> sample_indices(logits, temperature=0.0)
        tensor([1, 0])
        >>> generator = torch.Generator().manual_seed(0)
        >>> drawn = sample_indices(logits.expand(100, 2, 3), top_k=2, generator=generator)
        >>> drawn.shape, bool((drawn[:, 0] == 0).any())
        (torch.Size([100, 2]), False)
    """
    check_logits("logits", logits)
    check_at_least("temperature", temperature, 0.0)
    if top_k is not None:
        check_at_least("top_k", top_k, 1)
    if top_p is not None:
        check_number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
    if temperature == 0:
        return logits.argmax(dim=-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # With a maximum of 0, a small temperature cannot make it infinite.
    scaled = (wide - wide.amax(dim=-1, keepdim=True)) / max(
        temperature, torch.finfo(wide.dtype).tiny
    )
    if top_k is None and top_p is None:
        return (scaled + gumbel_noise(scaled, generator)).argmax(dim=-1)
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        places = torch.arange(scaled.shape[-1], device=scaled.device)
        scaled = scaled.masked_fill(places >= top_k, -torch.inf)
    if top_p is not None and top_p < 1:
        probabilities = scaled.softmax(dim=-1)
        # The total probability before each code; 0 for the first one, which is always kept.
        before = probabilities.cumsum(dim=-1).roll(1, dims=-1)
        before[..., 0] = 0.0
        scaled = scaled.masked_fill(before >= top_p, -torch.inf)
    place = (scaled + gumbel_noise(scaled, generator)).argmax(dim=-1, keepdim=True)
    return order.gather(-1, place).squeeze(-1)
