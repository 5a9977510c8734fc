"""Losses on reconstructions and features: perceptual, adversarial and alignment losses."""

from vqprior.losses._adaptive_weight import adaptive_weight
from vqprior.losses._adversarial import AdversarialLoss
from vqprior.losses._alignment import alignment_loss
from vqprior.losses._filter_bank import FilterBank, FilterBankLoss
from vqprior.losses._gan import GANObjective, HingeGAN, LeastSquaresGAN, NonSaturatingGAN
from vqprior.losses._perceptual import PerceptualLoss
from vqprior.losses._reconstruction import ReconstructionAwareLoss

__all__ = [
    "AdversarialLoss",
    "FilterBank",
    "FilterBankLoss",
    "GANObjective",
    "HingeGAN",
    "LeastSquaresGAN",
    "NonSaturatingGAN",
    "PerceptualLoss",
    "ReconstructionAwareLoss",
    "adaptive_weight",
    "alignment_loss",
]
