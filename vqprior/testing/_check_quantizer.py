"""``check_quantizer``, with one function per law."""

import copy
import pickle
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vqprior._checks import check_at_least, check_callable
from vqprior._interfaces import Quantizer
from vqprior.testing._subject import Subject, close, expect, first_difference, same

_WAITS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"})


def check_quantizer(
    make: Callable[[], Quantizer],
    dim: int,
    *,
    shape: tuple[int, ...] = (4, 9),
    device: str = "cpu",
    skip: tuple[str, ...] = (),
) -> None:
    """Checks that your own quantizer obeys the laws of ``Quantizer``.

    Checks all laws that need no process group, each on a new quantizer: ``"result"``,
    ``"decode"``, ``"purity"``, ``"gradient"``, ``"mask"``, ``"precision"``, ``"graph"``,
    ``"state"`` and ``"errors"``. Takes a second or two.

    Args:
        make: Factory of the quantizer. Define the quantizer's class at module level, so that it
            can be pickled. Random initialization is fine: every call uses the same seed.
        dim: Number of features of a token, at least 1.
        shape: Leading dimensions of the input; for a quantizer of feature maps, the batch size
            and the spatial size.
        device: Device to check on.
        skip: Laws that the quantizer breaks by design, such as ``"purity"`` for ``SelfUpdating``.

    Returns:
        None.

    Raises:
        AssertionError: If a law is broken; the message says which one and how.
        TypeError: If ``make`` is not callable.
        ValueError: If ``dim`` is below 1 or ``skip`` contains an unknown law.

    Shape:
        - input of the quantizer: ``(*shape, dim)``, or with features in dimension 1 if its
          ``features_last`` is False

    Examples:
        >>> from vqprior import VectorQuantizer
        >>> from vqprior.testing import check_quantizer
        >>> check_quantizer(lambda: VectorQuantizer(dim=4, codebook_size=16), dim=4)
    """
    check_callable("make", make, "Pass a factory such as `lambda: VectorQuantizer(4, 16)`.")
    check_at_least("dim", dim, 1)
    unknown = set(skip) - _LAWS.keys()
    if unknown:
        raise ValueError(
            f"`skip` must name laws, got {', '.join(sorted(unknown))}. Choose from "
            f"{', '.join(_LAWS)}."
        )
    subject = Subject(make, dim, tuple(shape), device)
    for name, law in _LAWS.items():
        if name not in skip:
            law(subject)


def _result(subject: Subject) -> None:
    """Shapes and dtypes are as declared, and ``loss`` is the sum of ``terms``."""
    for training in (True, False):
        quantizer, x = subject.quantizer(training=training), subject.x()
        out = quantizer(x)
        expect(quantizer.dim == subject.dim, "result", f"`dim` is {quantizer.dim}")
        expect(out.quantized.shape == x.shape, "result", f"`quantized` is {out.quantized.shape}")
        expect(out.quantized.dtype == x.dtype, "result", "`quantized` and `x` differ in dtype")
        expect(out.indices.dtype == torch.int64, "result", "`indices` are not int64")
        several = () if quantizer.num_codebooks == 1 else (quantizer.num_codebooks,)
        if quantizer.has_index_per_token:
            wanted = (*subject.shape, *several)
            found = tuple(out.indices.shape)
            expect(found == wanted, "result", f"`indices` are {found}, not {wanted}")
        expect(out.loss.dtype == torch.float32, "result", "`loss` is not float32")
        total = sum(out.terms.values(), torch.zeros((), device=x.device))
        expect(close(out.loss, total), "result", "`loss` is not the sum of `terms`")
        expect(
            len(out.selections) == len(quantizer.codebooks),
            "result",
            f"{len(out.selections)} selections for {len(quantizer.codebooks)} codebooks",
        )
        low = out.indices.amin() >= -1
        sizes = torch.tensor(quantizer.codebook_sizes, device=x.device)
        expect(low and (out.indices < sizes).all(), "result", "an index is out of range")


def _decode(subject: Subject) -> None:
    """``decode``, ``encode`` and ``quantize_as`` agree with ``forward``."""
    quantizer, x = subject.quantizer(training=False), subject.x()
    out = quantizer(x)
    expect(
        close(quantizer.decode(out.indices).to(x.dtype), out.quantized),
        "decode",
        "`decode(out.indices)` differs from `out.quantized`",
    )
    expect(same(quantizer.encode(x), out.indices), "decode", "`encode(x)` differs from `forward`")
    name = first_difference(quantizer.quantize_as(x, out.indices), out)
    expect(name is None, "decode", f"`quantize_as(x, out.indices)` differs from `forward`: {name}")
    nothing = quantizer.decode(torch.full_like(out.indices, -1))
    expect(not nothing.any(), "decode", "-1 does not decode to zeros")


def _purity(subject: Subject) -> None:
    """No call changes a parameter or a buffer, and eval mode draws no random number."""
    for training in (True, False):
        quantizer, x = subject.quantizer(training=training), subject.x()
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        noise = torch.get_rng_state()
        out = quantizer(x)
        quantizer.decode(quantizer.encode(x))
        quantizer.quantize_as(x, out.indices)
        mode = "training" if training else "eval"
        for name, value in quantizer.state_dict().items():
            expect(same(value, before[name]), "purity", f"a call in {mode} mode changed `{name}`")
        drawn = training or noise.equal(torch.get_rng_state())
        expect(drawn, "purity", "a call in eval mode drew a random number")


def _gradient(subject: Subject) -> None:
    """Gradients are finite and reach valid tokens only."""
    quantizer, mask = subject.quantizer(training=True), subject.mask()
    x = subject.x().requires_grad_()
    out = quantizer(x, mask)
    (grad,) = torch.autograd.grad(out.quantized.sum() + out.loss, x)
    tokens = subject.tokens(grad)
    expect(grad.isfinite().all(), "gradient", "the gradient of `x` is not finite")
    expect(tokens[mask].any(), "gradient", "no gradient reaches `x`")
    if quantizer.has_index_per_token:
        expect(not tokens[~mask].any(), "gradient", "a masked token has a gradient")
    quantizer.eval()
    out, results = quantizer(x), []
    for alike in (out, quantizer.quantize_as(x, out.indices)):
        results.append(torch.autograd.grad(alike.quantized.square().sum(), x)[0])
    expect(
        close(*results),
        "gradient",
        "`quantize_as(x, out.indices)` has another gradient than `forward`",
    )
    if "commitment" in out.terms:
        (grad,) = torch.autograd.grad(quantizer(x, mask).terms["commitment"], x)
        expect(grad.any(), "gradient", "the commitment term does not reach `x`")


def _mask(subject: Subject) -> None:
    """Masked and non-finite tokens are ignored, and the loss without valid tokens is 0."""
    mask = subject.mask()
    quantizer = subject.quantizer(training=False)
    whole = quantizer(subject.x(), torch.ones_like(mask))
    name = first_difference(quantizer(subject.x()), whole)
    expect(name is None, "mask", f"an all-true mask changes {name}")
    x = subject.tokens(subject.x())
    clean = quantizer(subject.arrange(x), mask)
    for value in (torch.nan, torch.inf, 1e30):
        dirty = subject.arrange(torch.where(mask.unsqueeze(-1), x, value))
        name = first_difference(quantizer(dirty, mask), clean)
        expect(name is None, "mask", f"{value} in a masked token changes {name}")
    broken = quantizer(subject.arrange(torch.where(mask.unsqueeze(-1), x, torch.nan)))
    expect(same(broken.loss, clean.loss), "mask", "an unmasked token with NaN changes the loss")
    if quantizer.has_index_per_token:
        expect((clean.indices[~mask] == -1).all(), "mask", "the index of a masked token is not -1")
        zero = not subject.tokens(clean.quantized)[~mask].any()
        expect(zero, "mask", "a masked token is not quantized to zeros")
    parameters = [p for p in quantizer.parameters() if p.requires_grad]
    for inputs in ((subject.x(), torch.zeros_like(mask)), (subject.x()[:0], mask[:0])):
        x = inputs[0].requires_grad_()
        out = quantizer(x, inputs[1])
        expect(out.loss == 0, "mask", f"the loss without valid tokens is {out.loss.item()}")
        total = out.loss + out.quantized.sum()
        grads = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
        finite = all(grad is None or grad.isfinite().all() for grad in grads)
        expect(finite, "mask", "a gradient without valid tokens is not finite")


def _precision(subject: Subject) -> None:
    """Autocast changes no index or loss; input and module in bfloat16 give bfloat16 output."""
    quantizer, x = subject.quantizer(training=False), subject.x()
    plain = quantizer(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        cast = quantizer(x)
    expect(same(cast.indices, plain.indices), "precision", "autocast changes `indices`")
    expect(close(cast.loss, plain.loss), "precision", "autocast changes `loss`")
    low = x.bfloat16()
    found = quantizer(low)
    expect(found.quantized.dtype == low.dtype, "precision", "`quantized` of bfloat16 is not")
    wide = quantizer(low.float()).indices
    expect(same(found.indices, wide), "precision", "bfloat16 input is not searched in float32")
    out = quantizer.bfloat16()(low)
    codes = quantizer.decode(out.indices)
    expect(codes.dtype == low.dtype, "precision", "`decode` of a bfloat16 module is not bfloat16")
    expect(close(codes, out.quantized), "precision", "`decode` of a bfloat16 module differs")


class _NoWait(TorchDispatchMode):
    """Records operators that read a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        self.found |= {func.name().partition(".")[0]} & _WAITS
        return func(*args, **(kwargs or {}))


def _graph(subject: Subject) -> None:
    """Compiles to one graph in both modes and does not synchronize the device."""
    for training in (True, False):
        quantizer, x = subject.quantizer(training=training), subject.x()
        with _NoWait() as watch:
            out = quantizer(x)
            quantizer.decode(quantizer.encode(x))
        operators = ", ".join(sorted(watch.found))
        expect(not watch.found, "graph", f"a call synchronizes the device: {operators}")
        torch._dynamo.reset()
        try:
            compiled = torch.compile(quantizer, backend="eager", fullgraph=True)(x)
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise AssertionError(
                f"graph: does not compile with `fullgraph=True`: {line}"
            ) from error
        if not training:
            name = first_difference(compiled, out)
            expect(name is None, "graph", f"compilation changes {name}")


def _state(subject: Subject) -> None:
    """``state_dict``, ``deepcopy`` and ``pickle`` preserve every result."""
    quantizer, x = subject.quantizer(training=False), subject.x()
    for parameter in quantizer.parameters():
        parameter.data.mul_(1.5)
    out = quantizer(x)
    fresh = subject.quantizer(training=False)
    fresh.load_state_dict(quantizer.state_dict())
    copies = {"`load_state_dict`": fresh, "`deepcopy`": copy.deepcopy(quantizer)}
    copies["`pickle`"] = pickle.loads(pickle.dumps(quantizer))
    for way, twin in copies.items():
        name = first_difference(twin(x), out)
        expect(name is None, "state", f"{way} changes {name}")


def _errors(subject: Subject) -> None:
    """Wrong input raises errors in the form of law 9."""
    quantizer, x, mask = subject.quantizer(training=False), subject.x(), subject.mask()
    indices = quantizer.encode(x)
    high = torch.full_like(indices, max(quantizer.codebook_sizes))
    wide = subject.arrange(torch.cat([subject.tokens(x), subject.tokens(x)[..., :1]], dim=-1))
    for call, kind, what in (
        (lambda: quantizer(x.long()), TypeError, "an integer `x`"),
        (lambda: quantizer(wide), ValueError, "one feature too many"),
        (lambda: quantizer(x, mask.float()), TypeError, "a float `mask`"),
        (lambda: quantizer(x, mask[:-1]), ValueError, "a `mask` of the wrong shape"),
        (lambda: quantizer.encode(wide), ValueError, "one feature too many in `encode`"),
        (lambda: quantizer.decode(indices.float()), TypeError, "a float tensor of `indices`"),
        (lambda: quantizer.quantize_as(x, indices[:-1]), ValueError, "`indices` of a wrong shape"),
        *(
            ((lambda: quantizer.decode(high), ValueError, "an index out of range"),)
            if subject.device == "cpu"
            else ()
        ),
    ):
        _expect_error(call, kind, what)


def _expect_error(call: Callable[[], object], kind: type[Exception], what: str) -> None:
    try:
        call()
    except kind as error:
        form = "` must " in str(error) and ", got " in str(error)
        wanted = "`argument` must ..., got ..."
        expect(form, "errors", f'{what}: "{error}" does not have the form "{wanted}"')
    except Exception as error:
        name = type(error).__name__
        raise AssertionError(f"errors: {what} raises {name}, not {kind.__name__}") from error
    else:
        raise AssertionError(f"errors: {what} is accepted silently")


_LAWS = {
    "result": _result,
    "decode": _decode,
    "purity": _purity,
    "gradient": _gradient,
    "mask": _mask,
    "precision": _precision,
    "graph": _graph,
    "state": _state,
    "errors": _errors,
}
