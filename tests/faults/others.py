"""Faults of metrics, networks, precision and ranks."""

from tests.faults.fault import Fault

OTHERS = {
    "constants-follow-to-new-memory": Fault(
        "_placement.py",
        "setattr(self, name, _moved(getattr(self, name), placed.device))",
        "setattr(self, name, fn(getattr(self, name)))",
        "contracts/test_meta.py",
        "materialized",
    ),
    "statistics-follow-half": Fault(
        "_precision.py",
        "new.dtype != old.dtype",
        "new.dtype == old.dtype",
        "contracts/test_rules.py",
        "keep_their_dtype and euclidean",
    ),
    "rules-write-to-a-part": Fault(
        "_distributed.py",
        'any(hasattr(tensor, "full_tensor") for tensor in tensors)',
        "False",
        "distributed/test_sharded_models.py",
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
        "before = count.to(mean.dtype)",
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
}
