"""Conditions under which a law applies to a quantizer."""

from tests.contracts.layouts import has
from vqprior import (
    BSQ,
    FSQ,
    LFQ,
    IndexEstimator,
    RequireFinite,
    SelfUpdating,
    TransformedCodebook,
)


def learned_by_rules(quantizer):
    return bool(quantizer.codebooks) and not has(quantizer, TransformedCodebook)


def ranks_codes(quantizer):
    """Whether every index belongs to an explicit codebook, so that ``logits`` exist."""
    return bool(quantizer.codebooks) and not has(quantizer, (BSQ, FSQ, LFQ))


def estimates_through_indices(quantizer):
    estimators = (getattr(module, "estimator", None) for module in quantizer.modules())
    return any(isinstance(estimator, IndexEstimator) for estimator in estimators)


def estimates_straight_through(quantizer):
    estimators = [getattr(module, "estimator", None) for module in quantizer.modules()]
    return all("straight" in getattr(e, "__name__", "") for e in estimators if e is not None)


def draws_in_training(quantizer):
    """Whether it has dropout or sampling, which act only in training mode."""
    options = [
        (getattr(m, "dropout", 0.0), getattr(getattr(m, "estimator", None), "estimator", ""))
        for m in quantizer.modules()
    ]
    return any(dropout > 0 or name in ("gumbel", "reinmax") for dropout, name in options)


def is_deterministic(quantizer):
    return not draws_in_training(quantizer)


def is_pure(quantizer):
    """Whether law 2 holds; ``SelfUpdating`` in training is the documented exception."""
    return not (quantizer.training and has(quantizer, SelfUpdating))


def waits_for_nothing(quantizer):
    """Whether law 6 holds; ``RequireFinite`` reads a number back, the documented exception."""
    return not has(quantizer, RequireFinite)


def skips_what_is_not_finite(quantizer):
    return not has(quantizer, RequireFinite)
