"""Revival of codes that nothing chooses."""

from typing import Any, final

import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._checks import check_at_least, check_interval, check_positive
from vqprior._interfaces import Codebook, QuantizerBase
from vqprior._results import QuantizerOutput, Selection
from vqprior._rules import UpdateRule
from vqprior.codebooks._shared._candidates import draw_candidates, draw_integers, is_new
from vqprior.codebooks._shared._fused import revive_fused_
from vqprior.codebooks._shared._watch import Watch
from vqprior.functional._statistics import sums_and_counts


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
        watch = Watch(
            uses=getattr(self, f"uses_{number}"),
            tokens=getattr(self, f"tokens_{number}"),
            steps=getattr(self, f"steps_{number}"),
            windows=getattr(self, f"windows_{number}"),
        )
        seed, size = self.seed + number, codebook.num_codes
        moved = revive_fused_(codebook, watch, selections, seed, self.threshold, self.patience)
        if moved is not None:
            if self.optimizer is not None:
                _reset_moments(self.optimizer, codebook, moved)
            return
        vectors = codebook.codes().detach()
        if watch.is_readable(selections, vectors):
            step = int(watch.steps.numpy())
            found = watch.count_here_(selections, vectors, self.threshold, self.patience)
            if found is None:
                return
            wanted, broken = found
            chance = draw_integers(seed, step, size, vectors.device)
            candidates, errors = draw_candidates(selections, chance)
        else:
            chance = draw_integers(seed, watch.steps, size, vectors.device)
            tokens, errors = draw_candidates(selections, chance)
            hits = [sums_and_counts(s.inputs[..., :0], s.indices, size)[1] for s in selections]
            payload = torch.cat([tokens, errors, sum(hits[1:], hits[0]).float()], dim=1)
            payload = _distributed.all_reduce_sum_(payload)
            candidates, errors = payload[:, :-2], payload[:, -2:-1]
            wanted, broken = watch.count_(payload[:, -1], vectors, self.threshold, self.patience)
        dead = wanted & is_new(candidates, errors, vectors.dtype)
        if broken is not None:
            dead = dead | broken
        codebook.set_codes_(candidates, dead)
        if self.optimizer is not None:
            _reset_moments(self.optimizer, codebook, dead)


def _reset_moments(optimizer: torch.optim.Optimizer, codebook: Codebook, where: Tensor) -> None:
    for parameter in codebook.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(where.unsqueeze(1), 0.0)
