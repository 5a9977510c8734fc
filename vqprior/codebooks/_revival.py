"""Revival of codes that nothing chooses."""

import math
from typing import Any, final

import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._checks import check_at_least, check_interval, check_positive
from vqprior._interfaces import Codebook, QuantizerBase, UpdateRule
from vqprior._results import QuantizerOutput, Selection
from vqprior.functional import code_sums_and_counts
from vqprior.functional._random import counter_integer


@final
class CodebookRevival(UpdateRule):
    """Moves codes that are hardly ever chosen onto vectors of the current batch.

    Uses are counted over windows of ``patience`` tokens per code. When a window closes, a code
    that was chosen less than ``threshold`` times as often as the average code moves to a random
    token of the joint batch of all ranks, unless a code is there already. On stationary data it
    stops reviving codes. It works for codebooks that learn by ``CodebookEMA`` or by gradient.

    A codebook that starts far from the data does not wait for a window: while the first one is
    open, all unused codes move as soon as fewer than a quarter of the codes are in use that as many
    evenly spread tokens would use. A codebook that fits the data, such as a loaded one, stays. A
    code with a NaN or an infinity moves at the next step.

    The random choice depends only on ``seed`` and the number of steps: it is the same on all
    ranks, restored with the ``state_dict``, and independent of the global generator.

    Args:
        quantizer: The quantizer whose codebooks are watched; wrappers of any depth.
        threshold: Fraction of the mean use below which a code counts as dead, at least 0.
        patience: Length of a window in tokens per code, greater than 0. Short windows mistake
            rare codes for dead ones.
        optimizer: The optimizer that trains the codebook by gradient; its moments of a revived
            row are set to zero. An attribute that copies (``deepcopy``, ``pickle``) do not carry:
            set theirs to their own optimizer.
        seed: Seed of the random choice, in ``[0, 2**31)``.

    Raises:
        ValueError: If ``threshold``, ``patience`` or ``seed`` is out of range or ``quantizer``
            has no codebook.

    Shape:
        - no tensors in the constructor

    References:
        Dhariwal et al., *Jukebox: A Generative Model for Music*, 2020, section 3.1 (random
        restarts). <https://arxiv.org/abs/2005.00341>. Deviations: relative to the mean use,
        over windows, from the joint batch of all ranks.

    Examples:
        >>> import torch
        >>> from vqprior import CodebookRevival, VectorQuantizer
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> revival = CodebookRevival(vq, patience=4)
        >>> x = 100 + torch.randn(256, 4)  # far from every code: one of them gets it all
        >>> vq(x).indices.unique().numel()
        1
        >>> revival.step(vq(x))
        >>> vq(x).indices.unique().numel() > 8
        True
    """

    def __init__(
        self,
        quantizer: QuantizerBase,
        *,
        threshold: float = 0.1,
        patience: float = 20.0,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(quantizer)
        check_at_least("threshold", threshold, 0.0)
        check_positive("patience", patience)
        check_interval("seed", seed, 0, 2**31)
        self.threshold = threshold
        self.patience = patience
        self.seed = seed
        self.optimizer = optimizer
        for number, codebook in enumerate(self.codebooks):
            device = codebook.codes().device
            uses = torch.zeros(codebook.num_codes, dtype=torch.float32, device=device)
            self.register_buffer(f"uses_{number}", uses)
            self.register_buffer(f"tokens_{number}", torch.zeros_like(uses[0]))
            steps = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer(f"steps_{number}", steps)
            self.register_buffer(f"windows_{number}", steps.clone())

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return f"threshold={self.threshold}, patience={self.patience}, seed={self.seed}"

    @torch.no_grad()
    def step(self, *outs: QuantizerOutput) -> None:
        """Counts results of the quantizer and revives codes where a window closes.

        Raises:
            TypeError: If a codebook is sharded over ranks.
            ValueError: If a result does not come from the rule's quantizer.
        """
        if not outs:
            return
        groups = self._selections_by_codebook(*outs)
        for number, parts in enumerate(zip(self.codebooks, groups, strict=True)):
            self._step_codebook(number, *parts)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the optimizer out of copies: it has the moments of the whole model."""
        return {**self.__dict__, "optimizer": None}

    def _step_codebook(self, number: int, codebook: Codebook, selections: list[Selection]) -> None:
        uses: Tensor = self.get_buffer(f"uses_{number}")
        tokens: Tensor = self.get_buffer(f"tokens_{number}")
        steps: Tensor = self.get_buffer(f"steps_{number}")
        windows: Tensor = self.get_buffer(f"windows_{number}")

        chance = _integers(self.seed + number, steps, codebook.num_codes)
        candidates, errors, hits = _draw_candidates(selections, chance)
        total = hits.sum()
        uses.add_(hits)
        tokens.add_(total)
        steps.add_((total > 0).to(steps.dtype))

        closes = tokens >= self.patience * codebook.num_codes
        rare = uses < self.threshold * tokens / codebook.num_codes
        starts = (windows == 0) & _has_collapsed(uses, tokens)
        vectors = codebook.codes()
        dead = (closes & rare) | (starts & (uses == 0))
        dead = dead & _is_new(candidates, errors, vectors.dtype)
        dead = dead | (~vectors.isfinite().all(dim=1) & (total > 0))
        codebook.set_codes_(candidates, dead)
        if self.optimizer is not None:
            _reset_moments(self.optimizer, codebook, dead)
        uses.copy_(torch.where(closes, 0.0, uses))
        tokens.copy_(torch.where(closes, 0.0, tokens))
        windows.add_(closes.to(windows.dtype))


def _has_collapsed(uses: Tensor, tokens: Tensor) -> Tensor:
    """Whether few codes are in use, compared with as many tokens spread evenly over the codes."""
    size = uses.shape[0]
    if size == 1:
        return torch.zeros_like(tokens, dtype=torch.bool)
    expected = -size * torch.expm1(tokens * math.log1p(-1 / size))
    return (uses > 0).sum() < 0.25 * expected


def _draw_candidates(selections: list[Selection], chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token of the joint batch for each code, without knowing on the host how many
    tokens count, and sums the uses of each code.

    Returns:
        Tokens ``(k, d)``, their squared distance to the code they chose ``(k,)``, uses ``(k,)``.
    """
    inputs = torch.cat([s.inputs.reshape(-1, s.inputs.shape[-1]) for s in selections]).float()
    codes = torch.cat([s.codes.reshape(-1, s.codes.shape[-1]) for s in selections]).float()
    mask = torch.cat([s.mask.reshape(-1) for s in selections])
    indices = torch.cat([s.indices.reshape(-1) for s in selections])

    local = torch.stack([s.mask.sum() for s in selections])
    per_rank = _distributed.all_gather_stack(local)
    joint = per_rank.sum(dim=0)
    # Selections follow each other, and the ranks within each: the order of the joint batch.
    before = joint.cumsum(0) - joint + per_rank[: _distributed.rank()].sum(dim=0)
    turn = (chance % joint.sum().clamp_min(1)).unsqueeze(1) - before
    own = (turn >= 0) & (turn < local)
    turn = torch.where(own, turn + local.cumsum(0) - local, 0).sum(dim=1)
    mine = own.any(dim=1)
    # The t-th counted token is the first place where the running count reaches t + 1. One row
    # is appended so that an empty batch can be indexed too.
    place = torch.searchsorted(mask.cumsum(0), turn + 1).clamp_max(mask.shape[0])
    tokens = torch.cat([inputs, inputs.new_zeros(1, inputs.shape[1])])[place]
    errors = torch.cat([(inputs - codes).square().sum(dim=1), inputs.new_zeros(1)])[place]

    hits = code_sums_and_counts(inputs[:, :0], indices, chance.shape[0])
    payload = torch.cat([tokens, errors.unsqueeze(1)], dim=1)
    payload = torch.where(mine.unsqueeze(1), payload, 0.0)
    payload = _distributed.all_reduce_sum_(torch.cat([payload, hits], dim=1))
    return payload[:, :-2], payload[:, -2], payload[:, -1]


def _is_new(candidates: Tensor, errors: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a token is further from its code than a learned code settles from its tokens.

    A code on top of its tokens still keeps a distance: what its dtype cannot resolve, and the
    bias of a smoothed average. Without the margin, revival on data with fewer distinct vectors
    than codes would never end. The spread is that of the drawn tokens: an offset is no spread, and
    neither are a few tokens far from all others.
    """
    center = candidates.sort(dim=0).values[len(candidates) // 2]
    distances = (candidates - center).square().sum(dim=1).sort().values
    spread = distances[9 * len(candidates) // 10]
    resolution = 1e-5 + torch.finfo(dtype).eps
    return errors > 1e-6 * spread + resolution**2 * candidates.square().sum(dim=1)


def _reset_moments(optimizer: torch.optim.Optimizer, codebook: Codebook, where: Tensor) -> None:
    for parameter in codebook.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(where.unsqueeze(1), 0.0)


def _integers(seed: int, step: Tensor, count: int) -> Tensor:
    """Returns ``count`` integers from 0 that depend on ``seed`` and ``step`` alone."""
    counter = torch.arange(1, count + 1, device=step.device) + step * count
    return counter_integer(counter + (seed << 32))
