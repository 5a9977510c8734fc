"""Initialization of codebooks from data."""

import torch
from torch import Tensor

from vqprior import _distributed
from vqprior._checks import check_choice, check_instance
from vqprior._interfaces import QuantizerBase
from vqprior.functional import kmeans


@torch.no_grad()
def initialize_codebooks_(
    quantizer: QuantizerBase,
    *inputs: Tensor,
    method: str = "kmeans",
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Initializes all codebooks of a quantizer from the vectors that reach them, in place.

    Codebooks are set in order, each from the vectors that it gets once the earlier ones are set,
    so stages of a residual quantizer start from residuals. Tokens of all ranks are used, and all
    ranks end with the same codebooks. Rules are not stepped.

    Args:
        quantizer: Any quantizer or wrapper.
        *inputs: What the quantizer is called with.
        method: ``"kmeans"`` (10 iterations), or ``"sample"`` for distinct random vectors.
        mask: True for real tokens; by default all. Masked tokens are left out.
        generator: Source of randomness.

    Raises:
        ValueError: If ``method`` is unknown or no valid vector reaches a codebook.

    Returns:
        Nothing.

    Shape:
        - ``inputs``: as the quantizer takes them

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer, initialize_codebooks_
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> x = 100 + torch.randn(1000, 4)
        >>> initialize_codebooks_(vq, x)
        >>> vq(x).indices.unique().numel()
        16
    """
    check_instance("quantizer", quantizer, QuantizerBase, "For example a `VectorQuantizer`.")
    check_choice("method", method, ("kmeans", "sample"))
    iterations = 10 if method == "kmeans" else 0
    options = {} if mask is None else {"mask": mask}
    modes = [(module, module.training) for module in quantizer.modules()]
    quantizer.eval()
    try:
        done: set[int] = set()
        for number, codebook in enumerate(quantizer.codebooks):
            if id(codebook) in done:
                continue
            done.add(id(codebook))
            selection = quantizer(*inputs, **options).selections[number]
            seen = _distributed.gather_rows(selection.inputs[selection.mask])
            vectors = kmeans(seen, codebook.num_codes, iterations=iterations, generator=generator)
            everywhere = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
            codebook.set_codes_(_distributed.broadcast_(vectors), everywhere)
    finally:
        for module, training in modes:
            module.training = training
