"""The rules that keep a codebook in use, as one call."""

from vqprior._checks import check_instance
from vqprior._interfaces import QuantizerBase
from vqprior.codebooks._chained import ChainedRules
from vqprior.codebooks._ema import CodebookEMA
from vqprior.codebooks._revival import CodebookRevival


def default_rules(quantizer: QuantizerBase) -> ChainedRules:
    """Returns the rules that keep codebooks learning and in use: moving average and revival.

    ``CodebookEMA`` and ``CodebookRevival`` as one object, for loops that call ``rules.step(out)``;
    ``SelfUpdating`` takes them by itself. Codebooks that cannot be set (``TransformedCodebook``)
    keep learning by gradient. A quantizer without any codebook that can be set gets no rule, and
    a step does nothing, so a training loop stays the same for every quantizer.

    Args:
        quantizer: The quantizer whose codebooks learn; wrappers of any depth.

    Returns:
        A module to be stepped; as a member of the model it is part of the ``state_dict``.

    Raises:
        TypeError: If ``quantizer`` is not a quantizer.

    Shape:
        - no tensors

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer, default_rules
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> rules = default_rules(vq)
        >>> x = 100 + torch.randn(1000, 4)  # far from where the codebook starts
        >>> for _ in range(3):
        ...     rules.step(vq(x))
        >>> vq.encode(x).unique().numel()
        16
    """
    check_instance("quantizer", quantizer, QuantizerBase, "For example a `VectorQuantizer`.")
    if not any(codebook.can_be_set for codebook in quantizer.codebooks):
        return ChainedRules()
    return ChainedRules(CodebookEMA(quantizer), CodebookRevival(quantizer))
