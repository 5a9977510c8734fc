"""Faults of codebooks, rules and starts."""

from tests.faults.fault import Fault

CODEBOOKS = {
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
    "statistics-follow-float64": Fault(
        "codebooks/_ema.py",
        "statistics.append(joint.float())",
        "statistics.append(joint)",
        "contracts/test_rules.py",
        "keep_their_dtype and euclidean",
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
        "contracts/test_cost.py",
        "rules_wait and revival and euclidean",
    ),
    "start-forgets-modes": Fault(
        "codebooks/_initialize.py",
        "module.training = training",
        "module.training = True",
        "codebooks/test_initialize.py",
        "mode",
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
}
