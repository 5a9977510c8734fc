"""Check that your own quantizer obeys the laws of ``Quantizer``."""

from vqprior.testing._check_quantizer import check_quantizer

__all__ = ["check_quantizer"]
