"""Residual quantization: each stage quantizes the residual of the stages before."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from vqprior._checks import check_at_least, check_callable, check_floating, check_fraction
from vqprior._interfaces import Codebook, GradientEstimator, Quantizer
from vqprior._results import QuantizerOutput
from vqprior._transforms import is_learning
from vqprior.functional import straight_through
from vqprior.quantizers._shared._columns import mask_indices, stack_logits
from vqprior.quantizers._shared._inputs import (
    check_indices,
    validate_assignment,
    validate_input,
    warn_of_channels_first,
)
from vqprior.quantizers._shared._outputs import code_dtype, merge_outputs
from vqprior.quantizers._shared._stages import Stages


@final
class ResidualQuantizer(Quantizer):
    """Residual quantization: each stage quantizes the residual of the stages before.

    ``quantized`` is the sum of the codes. One estimator is applied to the sum, so the gradient is
    the identity by default for any number of stages. The residual is ``x`` minus a constant, so
    the commitment loss of every stage has a gradient. Modules inside a stage, such as those of
    ``ProjectedQuantizer``, also learn from ``quantized``. Loss terms are means over stages. Where
    ``x`` needs a gradient, such modules run twice in a training step, so leave batch normalization
    and dropout to the networks around the quantizer.

    Pass the same quantizer several times to share its codebook: it is stored once, and a rule
    takes one step for all its uses.

    Args:
        quantizers: The stages, first to last, of equal ``dim``.
        dropout: Probability, in training mode, that a sample (an entry of dimension 0) keeps only
            its first ``m`` stages, with ``m`` uniform from 1 to the number of stages. Dropped
            stages have index -1 and contribute nothing. In ``(n, d)`` each vector is a sample;
            keep the batch dimension to draw for whole sequences or maps. Each call draws, so the
            groups of a ``GroupedQuantizer`` and the scales of a ``MultiScaleQuantizer`` draw for
            themselves. For one draw for all groups, make each stage a ``GroupedQuantizer``: the
            codes are the same. Random numbers come from torch's global generator, as in
            ``nn.Dropout``.
        beam_size: Number of partial sums that the search keeps, at least 1; 1 is the greedy
            search. Larger values need stages with ``nearest_indices`` and cost about
            ``beam_size`` times as much.
        estimator: A function ``(x, codes) -> codes`` that defines the gradient of the sum.

    Raises:
        TypeError: If an entry is not a quantizer, ``estimator`` is not callable, or ``beam_size``
            is above 1 and a stage has no ``nearest_indices``.
        ValueError: If ``quantizers`` is empty, stages differ in ``dim`` or do not have features
            last and indices for each token, or an option is out of range.

    Shape:
        - input: ``(..., d)``
        - output: ``quantized`` ``(..., d)``, ``indices`` ``(..., q)``, or ``(...)`` for one stage

    References:
        Lee et al., *Autoregressive Image Generation using Residual Quantization*, CVPR 2022,
        section 3.1. <https://arxiv.org/abs/2203.01941>
        Kumar et al., *High-Fidelity Audio Compression with Improved RVQGAN*, NeurIPS 2023,
        section 3.3 (dropout per sample). <https://arxiv.org/abs/2306.06546>

    Examples:
        >>> import torch
        >>> from vqprior import ResidualQuantizer, VectorQuantizer
        >>> rvq = ResidualQuantizer([VectorQuantizer(dim=8, codebook_size=16) for _ in range(4)])
        >>> out = rvq(torch.randn(2, 10, 8))
        >>> out.indices.shape, rvq.bits_per_token
        (torch.Size([2, 10, 4]), 16.0)
        >>> coarse = out.indices.clone()
        >>> coarse[..., 2:] = -1  # only the first two stages
        >>> rvq.decode(coarse).shape
        torch.Size([2, 10, 8])
    """

    def __init__(
        self,
        quantizers: Sequence[Quantizer],
        *,
        dropout: float = 0.0,
        beam_size: int = 1,
        estimator: GradientEstimator = straight_through,
    ) -> None:
        super().__init__()
        self.stages = Stages(quantizers)
        dims = [stage.dim for stage in self.stages]
        if len(set(dims)) > 1:
            raise ValueError(
                f"`quantizers` must have equal `dim`, got {dims}. Wrap stages of another `dim` in "
                "`ProjectedQuantizer`."
            )
        check_fraction("dropout", dropout)
        check_at_least("beam_size", beam_size, 1)
        check_callable("estimator", estimator, "For example `functional.straight_through`.")
        if beam_size > 1:
            for stage in self.stages:
                like = next(stage.parameters(), torch.zeros(()))
                stage.nearest_indices(like.new_zeros(1, stage.dim), 1)  # raises now if it cannot
        self.dropout = dropout
        self.beam_size = beam_size
        self.estimator = estimator

    @property
    def dim(self) -> int:
        """Number of features, equal for all stages."""
        return self.stages[0].dim

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codebook sizes of all stages, in order."""
        return self.stages.codebook_sizes

    @property
    def codebooks(self) -> tuple[Codebook, ...]:
        """Codebooks of all stages, in order."""
        return self.stages.codebooks

    @property
    def _learns_from_result(self) -> bool:
        """Whether any stage learns from the result."""
        return self.stages._learns_from_result

    def extra_repr(self) -> str:
        """Shows the options in ``repr``."""
        return f"dropout={self.dropout}, beam_size={self.beam_size}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantizes ``x`` ``(..., d)``; ``mask`` ``(...)`` is True for real tokens.

        Raises:
            TypeError: If ``x`` is not floating point or ``mask`` is not boolean.
            ValueError: If ``x`` or ``mask`` has the wrong shape.
        """
        x, valid = validate_input(x, mask, self.dim)
        warn_of_channels_first(self, x)
        kept = self._kept(valid)
        if self.beam_size == 1:
            return self._run(x, valid, lambda i, rest: self.stages[i](rest, valid & kept[i]))
        found = self._search_beam(x, valid)
        return self._run(
            x,
            valid,
            lambda i, rest: self.stages[i].quantize_as(rest, torch.where(kept[i], found[i], -1)),
        )

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the indices ``(..., q)`` of all stages, without dropout."""
        x, valid = validate_input(x, mask, self.dim)
        if self.beam_size > 1:
            return self.stages.join(self._search_beam(x, valid))
        dtype = code_dtype(self)
        rest = x.to(torch.promote_types(x.dtype, dtype))
        total, found = torch.zeros_like(x, dtype=dtype), []
        for stage in self.stages:
            indices = stage.encode(rest, valid)
            total = total + stage.decode(indices).to(rest.dtype).to(dtype)
            rest = x.to(rest.dtype) - total.to(rest.dtype)
            found.append(indices)
        return self.stages.join(found)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the sum of the codes ``(..., d)`` named by ``indices``; -1 adds nothing.

        Raises:
            TypeError: If ``indices`` is not an integer tensor.
            ValueError: If ``indices`` does not have one index per codebook, or one on the CPU
                names no code.
        """
        check_indices(indices, self.num_codebooks)
        dtype = code_dtype(self)
        total = torch.zeros((), dtype=dtype, device=indices.device)
        # In the order of `forward`, because float sums depend on the order.
        for stage, part in zip(self.stages, self.stages.split(indices), strict=True):
            total = total + stage.decode(part).to(dtype)
        return total.to(self.dtype)

    def quantize_as(self, x: Tensor, indices: Tensor) -> QuantizerOutput:
        """Returns the result as if ``indices`` ``(..., q)`` had been chosen; -1 drops a stage."""
        x, valid = validate_assignment(x, indices, self.dim, self.codebook_sizes)
        parts = self.stages.split(mask_indices(indices, valid, self.num_codebooks))
        return self._run(x, valid, lambda i, rest: self.stages[i].quantize_as(rest, parts[i]))

    def logits(
        self, x: Tensor, *, temperature: float = 1.0, indices: Tensor | None = None
    ) -> Tensor:
        """Returns logits over the codes of each stage for its residual: ``(..., q, k)``.

        Args:
            x: Vectors ``(..., d)``.
            temperature: Divides the logits, greater than 0.
            indices: Indices ``(..., q)`` to use for earlier stages (teacher forcing); by default
                those that each stage chooses. -1 is a choice not made yet: later stages score the
                same residual as this one.

        Raises:
            TypeError: If a stage has no explicit codebook.
            ValueError: If ``temperature`` is not greater than 0, or a shape is wrong.
        """
        check_floating("x", x)
        if indices is not None:
            check_indices(indices, self.num_codebooks)
        dtype = code_dtype(self)
        wide = x.to(torch.promote_types(x.dtype, dtype))
        rest, total, parts = wide, torch.zeros_like(wide, dtype=dtype), []
        given = None if indices is None else self.stages.split(indices)
        for number, stage in enumerate(self.stages):
            known = None if given is None else given[number]
            parts.append(stage.logits(rest, temperature=temperature, indices=known))
            with torch.no_grad():
                chosen = stage.encode(rest) if known is None else known
                total = total + stage.decode(chosen).to(dtype)
            rest = wide - total.to(wide.dtype)
        return stack_logits(parts, self.stages.counts)

    def _run(
        self, x: Tensor, valid: Tensor, quantize: Callable[[int, Tensor], QuantizerOutput]
    ) -> QuantizerOutput:
        """Runs all stages; ``quantize(number, residual)`` returns the result of one."""
        own = self.dtype
        dtype = torch.promote_types(own, torch.float32)
        wide = x.to(torch.promote_types(x.dtype, dtype))
        total = torch.zeros_like(wide, dtype=dtype)
        trained, rest, outs = None, wide, []
        for number, stage in enumerate(self.stages):
            out = quantize(number, rest)
            if torch.is_grad_enabled() and stage._learns_from_result:
                # Modules inside a stage learn from the result; `x` gets the outer estimator. Where
                # `x` has a gradient, that of the losses must reach it and this one must not, which
                # no single run of the stage can tell apart.
                alone = stage.quantize_as(rest.detach(), out.indices) if is_learning(x) else out
                inner = alone.quantized.to(dtype)
                carried = inner - inner.detach()
                trained = carried if trained is None else trained + carried
            total = total + out.quantized.detach().to(dtype)
            rest = wide - total.to(wide.dtype)
            outs.append(out)
        quantized = self.estimator(x, total.to(own).to(x.dtype))  # rounded as in `decode`
        if trained is not None:
            quantized = quantized + trained.to(x.dtype)
        quantized = torch.where(valid.unsqueeze(-1), quantized, 0.0)
        indices = self.stages.join([out.indices for out in outs])
        return merge_outputs(outs, quantized, indices, weight=1 / len(outs))

    def _kept(self, valid: Tensor) -> list[Tensor]:
        """Returns, for each stage, which samples keep it; broadcasts against ``valid``."""
        count = len(self.stages)
        if not self.training or self.dropout == 0:
            return [valid.new_ones((), dtype=torch.bool)] * count
        shape = (*valid.shape[:1], *[1] * (valid.ndim - 1))
        dropped = torch.rand(shape, device=valid.device) < self.dropout
        length = torch.randint(1, count + 1, shape, device=valid.device)
        return [~dropped | (length > stage) for stage in range(count)]

    @torch.no_grad()
    def _search_beam(self, x: Tensor, valid: Tensor) -> list[Tensor]:
        """Beam search over the stages; returns the indices of the best path, by stage."""
        rest = x.to(torch.promote_types(x.dtype, code_dtype(self))).unsqueeze(-2)
        paths: list[Tensor] = []
        for stage in self.stages:
            near = stage.nearest_indices(rest, min(self.beam_size, stage.codebook_size))
            left = rest.unsqueeze(-2) - stage.decode(near).to(rest.dtype)
            # A stable sort, so that ties go to the lowest index of the best path.
            cost = left.square().sum(dim=-1).flatten(-2)
            best = cost.sort(dim=-1, stable=True).indices[..., : self.beam_size]
            paths = [path.gather(-1, best // near.shape[-1]) for path in paths]
            paths.append(near.flatten(-2).gather(-1, best))
            rows = best.unsqueeze(-1).expand(*best.shape, left.shape[-1])
            rest = left.flatten(-3, -2).gather(-2, rows)
        return [torch.where(valid, path[..., 0], -1) for path in paths]
