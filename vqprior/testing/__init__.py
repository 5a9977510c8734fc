"""The laws of a quantizer, as a check for tests of your own."""

from vqprior.testing._check_quantizer import check_quantizer

__all__ = ["check_quantizer"]
