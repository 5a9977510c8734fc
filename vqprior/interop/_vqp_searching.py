"""Quantizers of vector-quantize-pytorch with a codebook."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vqprior._checks import check_at_least, check_choice
from vqprior._interfaces import Quantizer
from vqprior.codebooks._embedding import EmbeddingCodebook
from vqprior.codebooks._normalized import NormalizedCodebook
from vqprior.interop._reading import Layer, Reader, reject, to_linear
from vqprior.interop._simvq import transformed
from vqprior.nn import L2Norm
from vqprior.quantizers._grouped import GroupedQuantizer
from vqprior.quantizers._plain import VectorQuantizer
from vqprior.quantizers._projected import ProjectedQuantizer
from vqprior.quantizers._residual import ResidualQuantizer

_METRICS = ("cosine", "euclidean")
# The linear layer before, weight and bias of its layer norm, the linear layer after.
_Projections = tuple[Layer, tuple[Tensor, Tensor] | None, Layer] | None


def from_vqp_vector_quantize(
    state_dict: Mapping[str, Tensor],
    *,
    metric: str = "euclidean",
    heads: int | None = None,
    prefix: str = "",
) -> Quantizer:
    """Reads a ``VectorQuantize`` of vector-quantize-pytorch.

    Returns a ``VectorQuantizer``, wrapped in ``GroupedQuantizer`` for several heads and in
    ``ProjectedQuantizer`` if the checkpoint has projections or ``metric`` is ``"cosine"``. Indices
    are the same, features are last. The total commitment weight is 1, the default of that package.
    Statistics of the moving average are checked but not kept, so a ``CodebookEMA`` starts from
    counts of 1.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        metric: ``"cosine"`` for ``use_cosine_sim=True``, else ``"euclidean"``.
        heads: Number of heads, at least 1; needed if several heads share one codebook. By default
            the number of codebooks in ``state_dict``.
        prefix: Prefix of the quantizer's keys in ``state_dict``.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, ``metric`` is unknown
            or contradicts the codes, ``heads`` does not match the codebooks, or the codebook was
            not initialized yet.

    Shape:
        - ``_codebook.embed``: ``(1, k, d)``, or ``(heads, k, d)`` for separate codebooks
        - ``project_in.weight``: ``(heads * d, dim)``, or absent

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_vqp_vector_quantize
        >>> state = {
        ...     "_codebook.initted": torch.tensor(True),
        ...     "_codebook.cluster_size": torch.ones(1, 512),
        ...     "_codebook.embed_avg": torch.randn(1, 512, 64),
        ...     "_codebook.embed": torch.randn(1, 512, 64),
        ... }
        >>> vq = from_vqp_vector_quantize(state)
        >>> vq.dim, vq.codebook_size
        (64, 512)
    """
    check_choice("metric", metric, _METRICS)
    check_at_least("heads", 1 if heads is None else heads, 1)
    reader = Reader(state_dict, prefix, "VectorQuantize of vector-quantize-pytorch")
    codes = _codebook(reader, "_codebook", prefix)
    heads = codes.shape[0] if heads is None else heads
    if codes.shape[0] not in (1, heads):
        way_out = "Omit `heads`: each codebook has its own head."
        key = f"{prefix}_codebook.embed"
        raise reject(key, f"hold 1 or {heads} codebooks", codes.shape[0], way_out)
    projections = _projections(reader, heads * codes.shape[2])
    reader.finish()
    _check_metric(metric, list(codes))
    tables = [_searching(part, metric, 1 / heads) for part in codes]
    if heads == 1:
        return _projected(tables[0], projections)
    shared = tables * heads if len(tables) == 1 else tables
    return _projected(GroupedQuantizer(shared), projections)


def from_vqp_residual_vq(
    state_dict: Mapping[str, Tensor], *, metric: str = "euclidean", prefix: str = ""
) -> Quantizer:
    """Reads a ``ResidualVQ`` of vector-quantize-pytorch.

    Returns a ``ResidualQuantizer``, wrapped in ``ProjectedQuantizer`` if the checkpoint has
    projections. Indices are the same. If all codebooks are equal, as with
    ``shared_codebook=True``, the stages share one.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        metric: ``"cosine"`` for ``use_cosine_sim=True``, else ``"euclidean"``.
        prefix: Prefix of the quantizer's keys in ``state_dict``.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, ``metric`` is unknown
            or contradicts the codes, or a codebook was not initialized yet.

    Shape:
        - ``layers.{i}._codebook.embed``: ``(1, k, d)``
        - ``project_in.weight``: ``(d, dim)``, or absent

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_vqp_residual_vq
        >>> state = {}
        >>> for i in range(4):
        ...     state[f"layers.{i}._codebook.initted"] = torch.tensor(True)
        ...     state[f"layers.{i}._codebook.cluster_size"] = torch.ones(1, 16)
        ...     state[f"layers.{i}._codebook.embed_avg"] = torch.randn(1, 16, 8)
        ...     state[f"layers.{i}._codebook.embed"] = torch.randn(1, 16, 8)
        >>> from_vqp_residual_vq(state)(torch.randn(2, 10, 8)).indices.shape
        torch.Size([2, 10, 4])
    """
    check_choice("metric", metric, _METRICS)
    reader = Reader(state_dict, prefix, "ResidualVQ of vector-quantize-pytorch")
    tables, projections = _residual(reader, "", prefix)
    reader.finish()
    _check_metric(metric, tables)
    return _stacked(tables, projections, metric)


def from_vqp_grouped_residual_vq(
    state_dict: Mapping[str, Tensor], *, metric: str = "euclidean", prefix: str = ""
) -> GroupedQuantizer:
    """Reads a ``GroupedResidualVQ`` of vector-quantize-pytorch.

    Indices are ``(..., groups * q)``, with the stages of the first group first, where the original
    has ``(groups, b, n, q)``.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        metric: ``"cosine"`` for ``use_cosine_sim=True``, else ``"euclidean"``.
        prefix: Prefix of the quantizer's keys in ``state_dict``.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape, ``metric`` is unknown
            or contradicts the codes, or a codebook was not initialized yet.

    Shape:
        - ``rvqs.{g}.layers.{i}._codebook.embed``: ``(1, k, d)``

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_vqp_grouped_residual_vq
        >>> state = {}
        >>> for g in range(2):
        ...     name = f"rvqs.{g}.layers.0._codebook."
        ...     state[name + "initted"] = torch.tensor(True)
        ...     state[name + "cluster_size"] = torch.ones(1, 16)
        ...     state[name + "embed_avg"] = torch.randn(1, 16, 4)
        ...     state[name + "embed"] = torch.randn(1, 16, 4)
        >>> from_vqp_grouped_residual_vq(state)(torch.randn(2, 10, 8)).indices.shape
        torch.Size([2, 10, 2])
    """
    check_choice("metric", metric, _METRICS)
    reader = Reader(state_dict, prefix, "GroupedResidualVQ of vector-quantize-pytorch")
    count = max(reader.count("rvqs."), 1)
    groups = [_residual(reader, f"rvqs.{number}.", prefix) for number in range(count)]
    reader.finish()
    _check_metric(metric, [codes for tables, _ in groups for codes in tables])
    return GroupedQuantizer([_stacked(*group, metric) for group in groups])


def from_vqp_sim_vq(state_dict: Mapping[str, Tensor], *, prefix: str = "") -> VectorQuantizer:
    """Reads a ``SimVQ`` of vector-quantize-pytorch whose ``codebook_transform`` is linear.

    The codebook stays frozen and the linear layer learns. Loss weights are the defaults of that
    package: 0.25 on the commitment and 1 on the codebook term.

    Args:
        state_dict: The tensors of the checkpoint, by name.
        prefix: Prefix of the quantizer's keys in ``state_dict``.

    Returns:
        The quantizer, in the dtype of the checkpoint.

    Raises:
        ValueError: If a key is missing, unexpected or has another shape.

    Shape:
        - ``frozen_codebook``: ``(k, e)``
        - ``code_transform.weight``: ``(d, e)``

    Examples:
        >>> import torch
        >>> from vqprior.interop import from_vqp_sim_vq
        >>> state = {"frozen_codebook": torch.randn(16, 4), "code_transform.weight": torch.eye(4)}
        >>> from_vqp_sim_vq(state)(torch.randn(2, 10, 4)).indices.shape
        torch.Size([2, 10])
    """
    reader = Reader(state_dict, prefix, "SimVQ of vector-quantize-pytorch")
    codes = reader.take("frozen_codebook", None, None)
    weight, bias = reader.linear("code_transform", in_features=codes.shape[1])
    reader.finish()
    return transformed(codes, weight, bias, commitment_weight=0.25, codebook_weight=1.0)


def _codebook(reader: Reader, name: str, prefix: str, dim: int | None = None) -> Tensor:
    """Takes the codes ``(h, k, d)``; checks the moving average and drops it."""
    codes = reader.take(f"{name}.embed", None, None, dim)
    reader.take_any(f"{name}.embed_avg", *codes.shape)
    reader.take_any(f"{name}.cluster_size", *codes.shape[:2])
    if not bool(reader.take_any(f"{name}.initted")):
        key = f"{prefix}{name}.initted"
        raise reject(key, "hold an initialized codebook", "False", "Run a training step first.")
    return codes


def _check_metric(metric: str, tables: list[Tensor]) -> None:
    """Raises if the codes contradict ``metric``: ``use_cosine_sim`` keeps them at length 1."""
    lengths = torch.cat([codes.float().norm(dim=-1) for codes in tables])
    # So loose that codes saved in bfloat16 pass.
    found = "cosine" if bool(((lengths - 1).abs() < 0.01).all()) else "euclidean"
    if metric != found:
        raise ValueError(
            f"`metric` must be {found!r} for codes with lengths from {float(lengths.min()):.3g} to "
            f"{float(lengths.max()):.3g}, got {metric!r}. `use_cosine_sim=True` keeps them at 1."
        )


def _projections(reader: Reader, inner: int, before: str = "") -> _Projections:
    """Takes the projections around a quantizer of ``inner`` features, if there are any."""
    name, norm = f"{before}project_in", None
    if reader.has(f"{name}.0.weight") or reader.has(f"{name}.1.weight"):  # with a layer norm
        norm = reader.take(f"{name}.1.weight", inner), reader.take(f"{name}.1.bias", inner)
        name = f"{name}.0"
    if not reader.has(f"{name}.weight") and not reader.has(f"{before}project_out.weight"):
        return None
    down = reader.linear(name, out_features=inner)
    return down, norm, reader.linear(f"{before}project_out", inner, down[0].shape[1])


def _projected(quantizer: Quantizer, projections: _Projections) -> Quantizer:
    if projections is None:
        return quantizer
    down, norm, up = projections
    lower: nn.Module = to_linear(*down)
    if norm is not None:
        after = nn.LayerNorm(quantizer.dim)
        after.weight, after.bias = (nn.Parameter(part.detach().clone()) for part in norm)
        lower = nn.Sequential(lower, after)
    return ProjectedQuantizer(quantizer, lower, to_linear(*up), dim=down[0].shape[1])


def _searching(codes: Tensor, metric: str, commitment_weight: float) -> Quantizer:
    size, dim = codes.shape
    table = EmbeddingCodebook.from_codes(codes)
    if metric == "euclidean":
        return VectorQuantizer(dim, size, codebook=table, commitment_weight=commitment_weight)
    inner = VectorQuantizer(
        dim,
        size,
        codebook=NormalizedCodebook(table),
        metric="cosine",
        commitment_weight=commitment_weight,
    )
    return ProjectedQuantizer(inner, L2Norm(), nn.Identity())


def _residual(reader: Reader, before: str, prefix: str) -> tuple[list[Tensor], _Projections]:
    tables: list[Tensor] = []
    for number in range(max(reader.count(f"{before}layers."), 1)):
        dim = tables[0].shape[1] if tables else None
        name = f"{before}layers.{number}._codebook"
        codes = _codebook(reader, name, prefix, dim)
        if codes.shape[0] != 1:
            key = f"{prefix}{name}.embed"
            way_out = "Use `from_vqp_vector_quantize` for multi-head codebooks."
            raise reject(key, "hold one codebook", codes.shape[0], way_out)
        tables.append(codes[0])
    return tables, _projections(reader, tables[0].shape[1], before)


def _stacked(tables: list[Tensor], projections: _Projections, metric: str) -> Quantizer:
    same = all(torch.equal(tables[0], codes) for codes in tables)
    weight = float(len(tables))  # the package returns a loss per stage, to be summed
    distinct = [_searching(codes, metric, weight) for codes in (tables[:1] if same else tables)]
    return _projected(ResidualQuantizer(distinct * len(tables) if same else distinct), projections)
