"""Faults that random quantizers must find, whatever the tests of one class say."""

from tests.faults.fault import Fault

NESTINGS = {
    "random-residual-counts-a-stage-twice": Fault(
        "quantizers/_residual.py",
        "quantized = self.estimator(x, total.to(own).to(x.dtype))",
        "quantized = self.estimator(x, total.to(own).to(x.dtype)) + (x - x.detach())",
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
        "with without_autocast(x.device.type):",
        "if without_autocast(x.device.type):",
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
    "scales-without-indices-are-refined": Fault(
        "quantizers/_multi_scale.py",
        "known = (indices >= 0).flatten(1).any(dim=1)",
        "known = (indices >= -1).flatten(1).any(dim=1)",
        "contracts/test_value.py",
        "minus_one_names_nothing",
    ),
    "random-scales-encode-the-whole-again": Fault(
        "quantizers/_multi_scale.py",
        "rest = flat - total.to(flat.dtype)\n            found",
        "rest = flat - self._enlarged(indices, number).to(flat.dtype)\n            found",
        "contracts/test_cross_product.py",
        "law_1",
    ),
    "random-fsq-skips-its-bound": Fault(
        "quantizers/_shared/_levels.py",
        "return grad * ctx.saved_tensors[-1], None, None, None, None",
        "return grad * 1, None, None, None, None",
        "contracts/test_cross_product.py",
        "law_3",
    ),
    "random-bits-of-masked-tokens": Fault(
        "quantizers/_shared/_binary.py",
        'return torch.where(valid, joined, self._constant("_unnamed", bits.device))',
        "return joined",
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
        "with without_autocast(codes.device.type):",
        "if without_autocast(codes.device.type):",
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
    "random-rules-step-in-eval": Fault(
        "quantizers/_self_updating.py",
        "if self.training:",
        "if self.rules:",
        "contracts/test_cross_product.py",
        "law_2",
    ),
}
