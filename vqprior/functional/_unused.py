"""A loss for codes that no token chose."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from vqprior._checks import check_codes, check_instance
from vqprior._results import Selection
from vqprior.functional._kernels._host import is_on_host
from vqprior.functional._location import sizes_of


def unused_code_loss(selection: Selection, codes: Tensor) -> Tensor:
    """Pulls codes that no token chose toward tokens of the batch: mean of ``(sg[x] - code)^2``.

    The codebook loss moves only chosen codes, so codes that start far from the data are never
    chosen. Each unused code has another valid token as its target, evenly spaced over the
    batch; under ``torch.distributed``, over that of the rank. A small weight is enough: Adam
    rescales the gradient of codes that get no other, and codes that are chosen now and then hardly
    notice. Codes that are not finite are left out: no gradient repairs them.

    Args:
        selection: What one codebook saw and chose.
        codes: All codes of that codebook, with the gradient to what learns.

    Returns:
        An unweighted scalar in float32 or wider, averaged over all codes and features; 0 without
        valid tokens.

    Raises:
        TypeError: If ``codes`` is not floating point.
        ValueError: If ``codes`` is not a matrix of at least one code.

    Shape:
        - ``codes``: ``(k, d)``
        - returns: ``()``

    References:
        Zheng and Vedaldi, *Online Clustered Codebook*, ICCV 2023, section 3, moves unused codes
        onto tokens; this is a loss, so that a call stays pure.
        <https://arxiv.org/abs/2307.15139>

    Examples:
        >>> import torch
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.functional import unused_code_loss
        >>> vq = VectorQuantizer(dim=4, codebook_size=16)
        >>> out = vq(10 + torch.randn(100, 4))
        >>> unused_code_loss(out.selections[0], vq.codebook.codes()).backward()
        >>> unused = torch.ones(16, dtype=torch.bool).index_fill(0, out.indices.unique(), False)
        >>> torch.equal(vq.codebook.weight.grad.any(dim=1), unused)
        True
    """
    check_instance("selection", selection, Selection, "Pass one of the `selections` of a result.")
    check_codes("codes", codes)
    size, mask = codes.shape[0], selection.mask.reshape(-1)
    inputs = selection.inputs.detach().reshape(-1, codes.shape[1])
    indices = selection.indices.reshape(-1)
    if is_on_host(indices, mask, inputs, codes.detach()):
        return _of_unused_rows(codes, inputs, indices.numpy(), mask.numpy())
    wide = codes.to(torch.promote_types(codes.dtype, torch.float32))
    if mask.shape[0] == 0:
        return 0.0 * wide.sum()
    rows = torch.where(mask, indices, size)
    used = mask.new_zeros(size + 1).index_fill(0, rows, 1)[:size]
    # The t-th valid token is the first place where the running count exceeds t.
    count = mask.sum()
    turn = torch.arange(size, device=mask.device) * count // size
    place = torch.searchsorted(mask.cumsum(0), turn, right=True).clamp_max(mask.shape[0] - 1)
    targets = inputs[place].to(wide.dtype)
    pulled = (~used & (sizes_of(wide) < torch.inf) & (count > 0)).unsqueeze(1)
    return torch.where(pulled, wide - targets, 0.0).square().mean()


def _of_unused_rows(
    codes: Tensor, inputs: Tensor, indices: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]
) -> Tensor:
    """Computes the loss where the unused codes can be listed: from these rows alone."""
    used = np.zeros(len(codes), dtype=np.bool_)
    used[indices[mask]] = True
    places = np.flatnonzero(mask)
    rows = np.flatnonzero(~used) if len(places) > 0 else places
    wide = torch.promote_types(codes.dtype, torch.float32)
    pulled = codes.index_select(0, torch.from_numpy(rows)).to(wide)
    finite = np.isfinite(pulled.detach().numpy()).all(axis=1)
    if not finite.all():
        rows = rows[finite]
        pulled = codes.index_select(0, torch.from_numpy(rows)).to(wide)
    chosen = torch.from_numpy(places[rows * len(places) // len(codes)])
    targets = inputs.index_select(0, chosen).to(wide) if len(rows) > 0 else pulled.detach()
    return F.mse_loss(pulled, targets, reduction="sum") / codes.numel()
