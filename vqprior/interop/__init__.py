"""Readers that build quantizers from the checkpoints of other projects.

Each reader takes a dictionary of tensors and checks every key: a missing or unexpected key, or a
wrong shape, raises before anything is built. Load files with ``torch.load(..., weights_only=True)``
or ``safetensors``, which execute no code.
"""

from vqprior.interop._dac import from_dac
from vqprior.interop._encodec import from_encodec
from vqprior.interop._simvq import from_simvq
from vqprior.interop._taming import from_taming
from vqprior.interop._var import from_var
from vqprior.interop._vqp_implied import from_vqp_fsq, from_vqp_lfq
from vqprior.interop._vqp_searching import (
    from_vqp_grouped_residual_vq,
    from_vqp_residual_vq,
    from_vqp_sim_vq,
    from_vqp_vector_quantize,
)

__all__ = [
    "from_dac",
    "from_encodec",
    "from_simvq",
    "from_taming",
    "from_var",
    "from_vqp_fsq",
    "from_vqp_grouped_residual_vq",
    "from_vqp_lfq",
    "from_vqp_residual_vq",
    "from_vqp_sim_vq",
    "from_vqp_vector_quantize",
]
