"""Planted faults: each breaks one line of the library, and the suite must notice.

Coverage shows what ran, not what was checked. When a bug is fixed, its reversal joins the list.
"""

import dataclasses
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
EXIT = 100  # added to the exit code of pytest, since 1 is that of any process that broke


@dataclasses.dataclass(frozen=True)
class Fault:
    """In ``file``, ``old`` becomes ``new``; some test of ``tests``, narrowed by ``only``, fails."""

    file: str
    old: str
    new: str
    tests: str
    only: str = ""


FAULTS = {
    "estimator-sign": Fault(
        "functional/_estimators.py",
        "return grad, None",
        "return -grad, None",
        "functional/test_estimators.py",
    ),
    "estimator-rounds": Fault(
        "functional/_estimators.py",
        "def forward(x: Tensor, codes: Tensor) -> Tensor:\n        return codes.clone()",
        "def forward(x: Tensor, codes: Tensor) -> Tensor:\n        return x + (codes - x)",
        "functional/test_estimators.py",
    ),
    "search-ties-go-high": Fault(
        "functional/_kernels/_search_blocks.py",
        "(value < best[:, place])",
        "(value <= best[:, place])",
        "functional/test_search.py",
        "block_sizes and 1-5-3",
    ),
    "search-insertion-drops-an-equal": Fault(
        "functional/_kernels/_search_blocks.py",
        "closer = closer | (value < best[:, place])",
        "closer = value < best[:, place]",
        "functional/test_search.py",
        "block_sizes and 5-5-3",
    ),
    "search-forgets-where-its-block-starts": Fault(
        "functional/_kernels/_search_blocks.py",
        "member + group * groups.shape[1] + start",
        "member + group * groups.shape[1]",
        "functional/test_search.py",
        "block_sizes and 1-5-3",
    ),
    "search-offers-what-it-took": Fault(
        "functional/_kernels/_search_blocks.py",
        "groups.index_copy_(0, first + group, members)",
        "groups.index_copy_(0, first, members)",
        "functional/test_search.py",
        "block_sizes and 5-4-16",
    ),
    "search-fills-up-with-a-code": Fault(
        "functional/_kernels/_search_blocks.py",
        "bias.new_full((len(bias), missing), torch.inf)",
        "bias.new_full((len(bias), missing), -torch.inf)",
        "functional/test_search.py",
        "block_sizes",
    ),
    "search-takes-one-scale-for-all-codebooks": Fault(
        "functional/_search.py",
        "torch.frexp(largest)",
        "torch.frexp(largest[:1].expand_as(largest))",
        "functional/test_search.py",
        "several_codebooks",
    ),
    "straight-through-reaches-the-codes": Fault(
        "functional/_estimators.py",
        "_PassGradient.apply(x, codes.detach())",
        "_PassGradient.apply(x, codes)",
        "contracts/test_rules.py",
        "draws_no_global and spherical",
    ),
    "the-mean-counts-what-is-masked": Fault(
        "functional/_losses.py",
        "(mask.sum() * inputs.shape[-1]).clamp_min(1)",
        "(mask.numel() * torch.ones(()) * inputs.shape[-1]).clamp_min(1)",
        "functional/test_losses.py",
    ),
    "soft-forgets-the-codes": Fault(
        "functional/_select.py",
        "grad_codes += probabilities.T @ wide[part]",
        "grad_codes = probabilities.T @ wide[part]",
        "functional/test_select.py",
        "block_sizes and soft",
    ),
    "statistics-count-what-is-left-out": Fault(
        "functional/_statistics.py",
        "torch.where(indices >= 0, indices, num_codes)",
        "torch.where(indices >= 0, indices, 0)",
        "functional/test_statistics.py",
    ),
    "groups-of-several-metrics-at-once": Fault(
        "quantizers/_grouped.py",
        "if any(metric != metrics[0] for metric in metrics):",
        "if any(metric == 0 for metric in metrics):",
        "quantizers/test_grouped.py",
        "several_forms",
    ),
    "search-without-shift": Fault(
        "functional/_search.py",
        "shift = codes.mean(dim=1)",
        "shift = 0 * codes.mean(dim=1)",
        "functional/test_search.py",
        "offset",
    ),
    "search-in-low-precision": Fault(
        "functional/_search.py",
        "torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)",
        "torch.promote_types(x.dtype, codes.dtype)",
        "functional/test_search.py",
        "low_precision",
    ),
    "search-forgets-the-cross-term-factor": Fault(
        "functional/_kernels/_search_blocks.py",
        "alpha=-2.0",
        "alpha=-1.0",
        "functional/test_search.py",
        "match_the_definition",
    ),
    "statistics-in-float16": Fault(
        "functional/_statistics.py",
        "dtype = torch.promote_types(x.dtype, torch.float32)\n    # What",
        "dtype = x.dtype\n    # What",
        "functional/test_statistics.py",
    ),
    "statistics-by-one-hot": Fault(
        "functional/_statistics.py",
        "sums.index_add_(0, indices, x.to(dtype))",
        "sums += torch.eye(num_codes + 1).to(sums)[indices].T @ x.to(dtype)",
        "functional/test_statistics.py",
    ),
    "commitment-moves-codes": Fault(
        "functional/_losses.py",
        "commitment_and_codebook_mse(s.inputs, s.codes.detach(), s.mask)[0]",
        "sum(commitment_and_codebook_mse(s.inputs, s.codes, s.mask)) / 2",
        "functional/test_losses.py",
    ),
    "mean-of-nothing-is-nan": Fault(
        "functional/_losses.py",
        "(mask.sum() * difference.shape[-1]).clamp_min(1)",
        "(mask.sum() * difference.shape[-1])",
        "functional/test_losses.py",
    ),
    "cross-entropy-averages-over-ignored": Fault(
        "functional/_cross_entropy.py",
        "weights = torch.where(valid, weights, 0.0)",
        "weights = torch.where(valid, weights, 1.0)",
        "functional/test_cross_entropy.py",
        "minus_one",
    ),
    "rotation-turns-away": Fault(
        "functional/_estimators.py",
        "2 * gain * along_q",
        "-2 * gain * along_q",
        "functional/test_estimators.py",
        "formula",
    ),
    "rotation-between-opposites": Fault(
        "functional/_estimators.py",
        "(length > torch.finfo(dtype).eps ** 0.5)",
        "(length > 0)",
        "functional/test_estimators.py",
        "opposite or zero",
    ),
    "rotation-of-unbounded-gain": Fault(
        "functional/_estimators.py",
        "bound = torch.finfo(x.dtype).max ** 0.5",
        "bound = torch.finfo(torch.float32).max",
        "functional/test_estimators.py",
        "ends_of_the_range",
    ),
    "digits-in-the-wrong-order": Fault(
        "functional/_index_algebra.py",
        "joined = joined * level + digit",
        "joined = digit * level + joined",
        "functional/test_index_algebra.py",
    ),
    "distances-with-an-offset": Fault(
        "functional/_cross_entropy.py",
        "codes = codes - codes.mean(dim=0)",
        "codes = codes - 0 * codes.mean(dim=0)",
        "functional/test_cross_entropy.py",
        "offset",
    ),
    "gram-averages-over-masked-samples": Fault(
        "functional/_gram.py",
        "(num_tokens > 0).sum().clamp_min(1)",
        "max(len(num_tokens), 1)",
        "functional/test_gram.py",
        "each_sample",
    ),
    "bit-entropy-of-one-half": Fault(
        "functional/_entropy.py",
        "return first.T @ second",
        "return first.T @ torch.ones_like(second) / second.shape[1]",
        "functional/test_entropy.py",
        "all_codes",
    ),
    "entropy-of-one-rank": Fault(
        "functional/_entropy.py",
        "packed = _distributed.all_reduce_sum(packed)",
        "packed = packed + (_distributed.all_reduce_sum(packed) - packed).detach()",
        "distributed/test_two_ranks.py",
        "entropies",
    ),
    "sampling-stops-short-of-top-p": Fault(
        "functional/_sampling.py",
        "before = probabilities.cumsum(dim=-1).roll(1, dims=-1)",
        "before = probabilities.cumsum(dim=-1)",
        "functional/test_sampling.py",
        "top_p",
    ),
    "packing-trusts-its-header": Fault(
        "functional/_packing.py",
        "if num_rows * widths.count(0) > _MAX_FREE_INDICES:",
        "if num_rows > _MAX_SIZE:",
        "functional/test_packing.py",
        "impossible_headers and 2",
    ),
    "packing-without-a-checksum": Fault(
        "functional/_packing.py",
        'if zlib.crc32(payload) != struct.unpack_from("<I", data, start)[0]:',
        "if len(payload) != sum(lengths):",
        "functional/test_packing.py",
        "flipped",
    ),
    "selection-without-centering": Fault(
        "functional/_softmax_gradient.py",
        "probabilities * (grad - (probabilities * grad).sum(dim=-1, keepdim=True))",
        "probabilities * grad",
        "functional/test_select.py",
    ),
    "selection-without-temperature": Fault(
        "functional/_softmax_gradient.py",
        "_softmax_backward(probabilities, wanted) / temperature",
        "_softmax_backward(probabilities, wanted)",
        "functional/test_select.py",
    ),
    "reinmax-of-first-order": Fault(
        "functional/_softmax_gradient.py",
        "- _softmax_backward(start, grad) / 2",
        "- _softmax_backward(start, grad)",
        "functional/test_select.py",
        "reinmax",
    ),
    "gumbel-noise-upside-down": Fault(
        "functional/_select.py",
        "perturbed = logits + gumbel_noise",
        "perturbed = logits - gumbel_noise",
        "functional/test_select.py",
        "samples_follow",
    ),
    "kmeans-forgets-empty-clusters": Fault(
        "functional/_kmeans.py",
        "torch.where(useful.unsqueeze(1), x[worst[turn]], moved)",
        "moved",
        "functional/test_kmeans.py",
    ),
    "quantizer-ignores-the-mask": Fault(
        "quantizers/_shared/_inputs.py",
        "valid = valid & mask",
        "valid = valid | mask",
        "contracts/test_mask.py",
        "euclidean",
    ),
    "quantizer-lets-nan-in": Fault(
        "quantizers/_shared/_inputs.py",
        "return torch.where(valid.unsqueeze(-1), x, 0.0), valid",
        "return x, valid",
        "contracts/test_mask.py",
        "euclidean",
    ),
    "forward-changes-the-codebook": Fault(
        "quantizers/_plain.py",
        "vectors = self.codebook.codes()\n        if isinstance",
        "vectors = self.codebook.codes()\n        vectors.data.mul_(0.9)\n        if isinstance",
        "contracts/test_purity.py",
        "euclidean",
    ),
    "channels-swapped-with-width": Fault(
        "quantizers/_channels_first.py",
        "return x.movedim(1, -1)",
        "return x.transpose(1, -1)",
        "quantizers/test_channels_first.py",
    ),
    "texture-without-structure": Fault(
        "quantizers/_texture.py",
        "mask)\n        return replace_quantized(out, structure + out.quantized)",
        "mask)\n        return replace_quantized(out, out.quantized)",
        "quantizers/test_texture.py",
    ),
    "texture-shows-nan-to-the-fuse": Fault(
        "quantizers/_texture.py",
        "texture = torch.where(usable, texture, 0.0)",
        "texture = torch.where(usable, texture, texture)",
        "quantizers/test_texture.py",
    ),
    "rules-step-in-eval": Fault(
        "quantizers/_self_updating.py",
        "if self.training:",
        "if self.rules:",
        "quantizers/test_self_updating.py",
    ),
    "decay-swapped": Fault(
        "codebooks/_ema.py",
        "mass = mass.lerp(sums, 1 - self.decay)",
        "mass = mass.lerp(sums, self.decay)",
        "codebooks/test_ema.py",
        "textbook or by_hand",
    ),
    "unchosen-codes-drift": Fault(
        "codebooks/_ema.py",
        "codes.copy_(torch.where(chosen.unsqueeze(1), moved, codes))\n"
        "        codebook.set_codes_(codes, chosen)",
        "codes.copy_(moved)\n        codebook.set_codes_(codes, chosen | ~chosen)",
        "codebooks/test_ema.py",
        "textbook or by_hand",
    ),
    "rewritten-rows-keep-their-count": Fault(
        "codebooks/_ema.py",
        "torch.where(rewritten, 1.0, counts)",
        "torch.where(rewritten, counts, counts)",
        "codebooks/test_ema.py",
        "rewritten",
    ),
    "statistics-follow-half": Fault(
        "_precision.py",
        "new.dtype != old.dtype",
        "new.dtype == old.dtype",
        "contracts/test_rules.py",
        "keep_their_dtype and euclidean",
    ),
    "statistics-follow-float64": Fault(
        "codebooks/_ema.py",
        "statistics.append(joint.float())",
        "statistics.append(joint)",
        "contracts/test_rules.py",
        "keep_their_dtype and euclidean",
    ),
    "strangers-train-each-other": Fault(
        "quantizers/_self_updating.py",
        "for codebook in rule.codebooks} != known:",
        "for codebook in rule.codebooks} == set():",
        "quantizers/test_self_updating.py",
        "another",
    ),
    "lengths-of-tiny-codes-vanish": Fault(
        "functional/_search.py",
        "codes = torch.nn.functional.normalize(rows, dim=2)",
        "codes = torch.nn.functional.normalize(codes, dim=2)",
        "functional/test_search.py",
        "common_scale",
    ),
    "ema-of-one-rank": Fault(
        "codebooks/_ema.py",
        "_distributed.all_reduce_sums(statistics)",
        "statistics",
        "distributed/test_two_ranks.py",
        "ema",
    ),
    "revival-draws-from-every-rank": Fault(
        "codebooks/_revival.py",
        "per_rank[: _distributed.rank()].sum(dim=0)",
        "0 * per_rank[: _distributed.rank()].sum(dim=0)",
        "distributed/test_two_ranks.py",
        "revival",
    ),
    "revival-puts-ranks-before-stages": Fault(
        "codebooks/_revival.py",
        "before = joint.cumsum(0) - joint + per_rank[: _distributed.rank()].sum(dim=0)",
        "before = local.cumsum(0) - local + per_rank[: _distributed.rank()].sum()",
        "distributed/test_joint_batch.py",
        "2-residual_shared_learns_as_one_by_revival",
    ),
    "rules-write-to-a-part": Fault(
        "_distributed.py",
        'if any(hasattr(parameter, "full_tensor") for parameter in codebook.parameters()):',
        "if False:",
        "distributed/test_wrapped_models.py",
        "sharded_codebooks",
    ),
    "usage-counts-what-was-skipped": Fault(
        "metrics/_codebook_usage.py",
        "self.skipped += skipped.sum()",
        "self.skipped += skipped.numel()",
        "metrics/test_codebook_usage.py",
    ),
    "frechet-forgets-the-gap-between-batches": Fault(
        "metrics/_frechet.py",
        ".addr_(before * share * gap, gap)",
        "",
        "metrics/test_frechet.py",
        "split_into_batches",
    ),
    "frechet-forgets-the-gap-between-ranks": Fault(
        "metrics/_frechet.py",
        "all_reduce_sum_(self.scatters + between)",
        "all_reduce_sum_(self.scatters + 0 * between)",
        "distributed/test_joint_batch.py",
        "2-frechet",
    ),
    "frechet-shares-in-float32": Fault(
        "metrics/_frechet.py",
        "before = count.double()",
        "before = count",
        "metrics/test_frechet.py",
        "split_into_batches",
    ),
    "frechet-takes-the-root-of-rounding": Fault(
        "metrics/_frechet.py",
        "spread = values > len(values) * torch.finfo(values.dtype).eps * values[-1]",
        "spread = values > 0",
        "metrics/test_frechet.py",
        "singular",
    ),
    "start-differs-between-ranks": Fault(
        "codebooks/_initialize.py",
        "_distributed.broadcast_(vectors)",
        "vectors",
        "distributed/test_two_ranks.py",
        "initialize",
    ),
    "revival-never-ends": Fault(
        "codebooks/_revival.py",
        "dead = closes & rare & _is_new(candidates, errors, codebook)",
        "dead = closes & rare",
        "codebooks/test_revival.py",
        "fewer_distinct",
    ),
    "revival-keeps-moments": Fault(
        "codebooks/_revival.py",
        "value.masked_fill_(where.unsqueeze(1), 0.0)",
        "value.masked_fill_(where.unsqueeze(1), 0.5)",
        "codebooks/test_revival.py",
        "moments",
    ),
    "revival-window-stays-open": Fault(
        "codebooks/_revival.py",
        "uses.copy_(torch.where(closes, 0.0, uses))",
        "uses.copy_(torch.where(closes, uses, uses))",
        "codebooks/test_revival.py",
        "window",
    ),
    "revival-waits-for-the-device": Fault(
        "codebooks/_revival.py",
        "closes = tokens >=",
        "closes = tokens.new_tensor(tokens.item()) >=",
        "contracts/test_compile.py",
        "rules_wait and revival and euclidean",
    ),
    "start-forgets-modes": Fault(
        "codebooks/_initialize.py",
        "module.training = training",
        "module.training = True",
        "codebooks/test_initialize.py",
        "mode",
    ),
    # Bugs that random quantizers must find, whatever the tests of one class say.
    "random-residual-counts-a-stage-twice": Fault(
        "quantizers/_residual.py",
        "quantized = self.estimator(x, total.to(x.dtype))",
        "quantized = self.estimator(x, total.to(x.dtype)) + (x - x.detach())",
        "contracts/test_cross_product.py",
        "law_3",
    ),
    "random-residual-drops-in-eval": Fault(
        "quantizers/_residual.py",
        "if not self.training or self.dropout == 0:",
        "if self.dropout == 0:",
        "contracts/test_cross_product.py",
        "law_2",
    ),
    "random-grouped-forgets-the-mask": Fault(
        "quantizers/_grouped.py",
        "outs = [group(part, valid) for group",
        "outs = [group(part) for group",
        "contracts/test_cross_product.py",
        "law_4",
    ),
    "random-projected-raises-masked-tokens": Fault(
        "quantizers/_projected.py",
        "return replace_quantized(out, torch.where(named.unsqueeze(-1), raised, 0.0))",
        "return replace_quantized(out, raised)",
        "contracts/test_cross_product.py",
        "law_1",
    ),
    "random-projected-follows-autocast": Fault(
        "quantizers/_projected.py",
        "with torch.autocast(x.device.type, enabled=False):",
        "with torch.no_grad() if not torch.is_grad_enabled() else torch.enable_grad():",
        "contracts/test_cross_product.py",
        "law_5",
    ),
    "random-scales-average-masked-positions": Fault(
        "functional/_resizing.py",
        "weight = mask.unsqueeze(-1).to(x.dtype)",
        "weight = torch.ones_like(mask).unsqueeze(-1).to(x.dtype)",
        "contracts/test_cross_product.py",
        "law_4",
    ),
    "random-scales-encode-the-whole-again": Fault(
        "quantizers/_multi_scale.py",
        "rest = flat - total.to(flat.dtype)\n            found",
        "rest = flat - self._enlarged(indices, number).to(flat.dtype)\n            found",
        "contracts/test_cross_product.py",
        "law_1",
    ),
    "random-fsq-skips-its-bound": Fault(
        "quantizers/_fsq.py",
        "straight_through(self._values(prepared).to(x.dtype), codes)",
        "straight_through(x, codes)",
        "contracts/test_cross_product.py",
        "law_3",
    ),
    "random-bits-of-masked-tokens": Fault(
        "quantizers/_shared/_binary.py",
        "return torch.where(valid, join_indices(bits, (2,) * self.num_bits), -1)",
        "return join_indices(bits, (2,) * self.num_bits)",
        "contracts/test_cross_product.py",
        "law_4",
    ),
    "random-mask-is-ignored": Fault(
        "quantizers/_shared/_inputs.py",
        "valid = valid & mask",
        "valid = valid | mask",
        "contracts/test_cross_product.py",
        "law_4",
    ),
    "random-simvq-follows-autocast": Fault(
        "codebooks/_transformed.py",
        "with torch.autocast(codes.device.type, enabled=False):",
        "with torch.no_grad() if not torch.is_grad_enabled() else torch.enable_grad():",
        "contracts/test_cross_product.py",
        "law_5",
    ),
    "random-assigned-masks-name-the-last-code": Fault(
        "quantizers/_plain.py",
        "return self._result(x, valid, indices.long().clamp_min(0))",
        "return self._result(x, valid | (indices < 0), indices.long().clamp_min(0))",
        "contracts/test_cross_product.py",
        "assign",
    ),
    "ibq-shares-memory-with-the-codebook": Fault(
        "functional/_index_backpropagation.py",
        "wide, table.clone(), indices",
        "wide, table, indices",
        "contracts/test_gradient.py",
        "ibq",
    ),
    "random-rules-step-in-eval": Fault(
        "quantizers/_self_updating.py",
        "if self.training:",
        "if self.rules:",
        "contracts/test_cross_product.py",
        "law_2",
    ),
    "residual-remainder-keeps-its-gradient": Fault(
        "quantizers/_residual.py",
        "total = total + out.quantized.detach().to(dtype)",
        "total = total + out.quantized.to(dtype)",
        "quantizers/test_residual.py",
        "commitment_gradients",
    ),
    "residual-trains-the-input-again": Fault(
        "quantizers/_residual.py",
        "stage.quantize_as(rest.detach(), out.indices)",
        "stage.quantize_as(rest, out.indices)",
        "quantizers/test_residual.py",
        "modules_of_a_stage",
    ),
    "dropout-keeps-one-stage-more": Fault(
        "quantizers/_residual.py",
        "(length > stage)",
        "(length >= stage)",
        "quantizers/test_residual.py",
        "uniform_length",
    ),
    "beam-takes-the-wrong-path": Fault(
        "quantizers/_residual.py",
        "path.gather(-1, best // near.shape[-1])",
        "path.gather(-1, best % path.shape[-1])",
        "quantizers/test_residual.py",
        "exhaustive",
    ),
    "residual-teacher-is-ignored": Fault(
        "quantizers/_residual.py",
        "chosen = stage.encode(rest) if known is None else known",
        "chosen = stage.encode(rest)",
        "quantizers/test_residual.py",
        "teacher_forced",
    ),
    "residual-assigns-what-is-not-finite": Fault(
        "quantizers/_residual.py",
        "self.stages.split(mask_indices(indices, valid, self.num_codebooks))",
        "self.stages.split(indices)",
        "quantizers/test_residual.py",
        "not_finite",
    ),
    "grouped-ignores-the-mask": Fault(
        "quantizers/_grouped.py",
        "[group(part, valid) for",
        "[group(part) for",
        "quantizers/test_grouped.py",
        "separate",
    ),
    "grouped-assigns-what-is-not-finite": Fault(
        "quantizers/_grouped.py",
        "mask_indices(indices, valid, self.num_codebooks)",
        "indices",
        "quantizers/test_grouped.py",
        "whole_token",
    ),
    "bias-in-masked-tokens": Fault(
        "quantizers/_projected.py",
        "torch.where(has_any_index(indices, self.num_codebooks).unsqueeze(-1), vectors, 0.0)",
        "vectors",
        "quantizers/test_projected.py",
        "has_a_bias",
    ),
    "scales-enlarge-bilinearly": Fault(
        "functional/_resizing.py",
        '2: "bicubic"',
        '2: "bilinear"',
        "quantizers/test_multi_scale.py",
        "independent",
    ),
    "scales-pick-instead-of-averaging": Fault(
        "functional/_resizing.py",
        'mode="area"',
        'mode="nearest"',
        "quantizers/test_multi_scale.py",
        "independent",
    ),
    "scales-sum-their-losses": Fault(
        "quantizers/_multi_scale.py",
        "weight * losses[name] / len(self.scales)",
        "weight * losses[name]",
        "quantizers/test_multi_scale.py",
        "independent",
    ),
    "scales-train-the-map-twice": Fault(
        "quantizers/_multi_scale.py",
        "commitment_and_codebook_mse(pulled, pulling, valid)",
        "commitment_and_codebook_mse(pulled, pulling, valid)[::-1]",
        "quantizers/test_multi_scale.py",
        "independent",
    ),
    "refine-never-sees-the-end": Fault(
        "quantizers/_multi_scale.py",
        "number / max(len(self.scales) - 1, 1)",
        "number / len(self.scales)",
        "quantizers/test_multi_scale.py",
        "positions_from_0",
    ),
    "scales-assign-what-is-not-finite": Fault(
        "quantizers/_multi_scale.py",
        "mask_indices(given[number], seen, self.num_codebooks)",
        "given[number]",
        "quantizers/test_multi_scale.py",
        "assign_leaves_out",
    ),
    "fsq-offset-of-odd-levels": Fault(
        "quantizers/_fsq.py",
        "torch.where(self.levels % 2 == 0, 0.5, 0.0)",
        "torch.where(self.levels % 2 == 0, 0.0, 0.5)",
        "quantizers/test_fsq.py",
        "formula",
    ),
    "fsq-ties-go-to-even-levels": Fault(
        "quantizers/_fsq.py",
        "(prepared - 0.5).ceil()",
        "prepared.round()",
        "quantizers/test_fsq.py",
        "ties",
    ),
    "fsq-leaves-the-code-space": Fault(
        "quantizers/_fsq.py",
        "torch.minimum(nearest.clamp_min(0), self.levels - 1)",
        "nearest",
        "quantizers/test_fsq.py",
        "saturation",
    ),
    "bits-in-the-wrong-order": Fault(
        "quantizers/_shared/_binary.py",
        "bits = (prepared > 0).long()",
        "bits = (prepared > 0).long().flip(-1)",
        "quantizers/test_lfq.py",
        "order_of_their_bits",
    ),
    "zero-counts-as-positive": Fault(
        "quantizers/_shared/_binary.py",
        "bits = (prepared > 0).long()",
        "bits = (prepared >= 0).long()",
        "quantizers/test_lfq.py",
        "zero",
    ),
    "log-odds-of-a-dot-product": Fault(
        "quantizers/_shared/_binary.py",
        "4 * self.scale / self.temperature",
        "2 * self.scale / self.temperature",
        "quantizers/test_bsq.py",
        "all_codes",
    ),
    "sphere-of-squares-that-vanish": Fault(
        "functional/_unit.py",
        "x / torch.where(nonzero, largest, 1.0)",
        "x",
        "quantizers/test_bsq.py",
        "ends_of_the_range",
    ),
    "averages-of-normalized-codes-start-again": Fault(
        "codebooks/_ema.py",
        "written.copy_(codebook.codes())",
        "written.copy_(codes)",
        "codebooks/test_normalized.py",
        "textbook",
    ),
    "unit-codes-of-any-length": Fault(
        "codebooks/_normalized.py",
        "self.codebook.set_codes_(F.normalize(codes, dim=1), where)",
        "self.codebook.set_codes_(codes, where)",
        "codebooks/test_normalized.py",
        "assigned",
    ),
    "ibq-without-temperature": Fault(
        "functional/_index_backpropagation.py",
        "probabilities = (logits / temperature).softmax(dim=-1)",
        "probabilities = logits.softmax(dim=-1)",
        "functional/test_index_backpropagation.py",
        "select_codes",
    ),
    "gumbel-repeats-its-noise-in-each-block": Fault(
        "functional/_index_backpropagation.py",
        "torch.arange(part.start * k, part.stop * k,",
        "torch.arange(0, (part.stop - part.start) * k,",
        "functional/test_index_backpropagation.py",
        "noise and blocks",
    ),
    "ibq-returns-a-view": Fault(
        "functional/_index_backpropagation.py",
        "codes.index_select(0, indices.reshape(-1)).reshape(*indices.shape, codes.shape[1])",
        "codes[indices]",
        "functional/test_index_backpropagation.py",
        "leading",
    ),
    "random-projection-back-by-the-transpose": Fault(
        "quantizers/_random_projection.py",
        "torch.linalg.pinv(projection)",
        "projection.T.contiguous()",
        "quantizers/test_random_projection.py",
        "shortest",
    ),
    "finite-even-where-masked": Fault(
        "quantizers/_require_finite.py",
        "broken = broken & mask",
        "broken = broken | ~mask",
        "quantizers/test_require_finite.py",
        "masked",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "examples", "benchmarks")
    for part in ("vqprior", "tests"):
        shutil.copytree(REPO / part, folder / part, ignore=ignore)
    shutil.copy(REPO / "pyproject.toml", folder)
    return folder


@pytest.fixture(scope="module")
def processes():
    """Forks of a process that has imported torch: most of what a run of pytest waits for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.testing", "torch.export", "torch._dynamo"])
    return context


def run_pytest(folder, arguments):
    """Runs in a process of its own, which must see the package and tests of ``folder`` alone."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "vqprior")]:
        del sys.modules[name]
    sys.path[:] = [
        str(folder),
        *(p for p in sys.path if Path(p).resolve() not in (REPO, Path.cwd())),
    ]
    sys.dont_write_bytecode = True  # it would outlive the fault
    os.chdir(folder)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    result = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    sys.exit(EXIT + int(result))


@pytest.mark.full
@pytest.mark.parametrize("name", FAULTS)
def test_the_suite_notices(copy, processes, name):
    fault = FAULTS[name]
    path = copy / "vqprior" / fault.file
    original = path.read_text()
    assert original.count(fault.old) == 1, f"the line is gone: plant {name} somewhere else"
    arguments = [f"tests/{fault.tests}", *(["-k", fault.only] if fault.only else [])]
    path.write_text(original.replace(fault.old, fault.new))
    try:
        process = processes.Process(target=run_pytest, args=(copy, arguments))
        process.start()
        process.join()
    finally:
        path.write_text(original)
    # Any other code, for an error at import or for no test at all, proves nothing.
    assert process.exitcode == EXIT + pytest.ExitCode.TESTS_FAILED, (copy / "log.txt").read_text()[
        -3000:
    ]


@pytest.mark.full
def test_without_a_fault_the_copy_passes(copy, processes):
    process = processes.Process(target=run_pytest, args=(copy, ["tests/functional/test_losses.py"]))
    process.start()
    process.join()
    assert process.exitcode == EXIT + pytest.ExitCode.OK, (copy / "log.txt").read_text()[-3000:]
