"""Against the quantizers of EnCodec, the Descript Audio Codec, taming-transformers, CodeFormer.

What these packages depend on does not install beside the torch of ``pyproject.toml``; each test
says in its reason for skipping how to install the one that it compares with.
"""

import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from tests.peers.packages import load
from vqprior import ChannelsFirst, CodebookEMA, interop


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


def assert_decided(read, state, x):
    """The comparison is of tokens whose nearest code does not depend on rounding.

    Rounding is measured: the scores here, in the dtype of the state and in double precision. The
    scores there have up to twice the terms, and two of them have to keep their order: four times.
    Again twice that, for what one measurement does not show.
    """
    exact = read({key: value.double() for key, value in state.items()})
    scores = exact.logits(x.double())
    # Indices of earlier stages are given, so that later ones see what is left over by the same.
    rounded = read(state).logits(x, indices=exact.encode(x.double())).double()
    first, second = scores.topk(2).values.unbind(-1)
    assert (first - second > 8 * (rounded - scores).abs().amax(-1)).all()
    # Nor less than numbers of this dtype can show.
    assert (first - second).min() > 8 * torch.finfo(x.dtype).eps


def assert_rounded(ours, theirs, roundings, size):
    """Equal up to so many roundings of numbers of this size, each by half of ``eps`` of it."""
    unit = torch.finfo(theirs.dtype).eps / 2
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=roundings * unit * float(size))


def largest(*tensors):
    return sum(tensor.detach().abs().max() for tensor in tensors)


def longest(vectors):
    return vectors.detach().norm(dim=-1).max()


class Registry:
    """In place of a registry of architectures: registers nothing."""

    def register(self):
        return lambda cls: cls


def taming():
    return load("taming-transformers", "0.0.1", "taming.modules.vqvae.quantize")


def codeformer():
    # Its second top-level package is named as BasicSR, which it may have been installed over.
    return load(
        "codeformer",
        "0.0.11",
        "codeformer.basicsr.archs.vqgan_arch",
        {
            "basicsr.utils": {"get_root_logger": None},
            "basicsr.utils.registry": {"ARCH_REGISTRY": Registry()},
        },
    )


def encodec():
    return load("encodec", "0.1.1", "encodec.quantization.vq")


def dac():
    return load("descript-audio-codec", "1.0.0", "dac.nn.quantize")


@pytest.mark.parametrize("module", [taming, codeformer, encodec, dac])
def test_nothing_stays_loaded(module):
    before = dict(sys.modules)
    loaded = module()
    top = loaded.__name__.partition(".")[0]
    assert loaded.__file__
    for name in (top, "basicsr", loaded.__name__):
        assert sys.modules.get(name) is before.get(name)


@pytest.mark.parametrize(
    ("module", "decode"), [(taming, "get_codebook_entry"), (codeformer, "get_codebook_feat")]
)
def test_from_taming(module, decode):
    theirs = module().VectorQuantizer(32, 8, 0.25)
    nn.init.normal_(theirs.embedding.weight)  # those of its start are all but equal
    read = partial(interop.from_taming, metric="euclidean")
    plain = read(theirs.state_dict())
    ours, codes = ChannelsFirst(plain), plain.codebook.weight
    x = torch.randn(2, 8, 10, 12, requires_grad=True)
    assert_decided(read, theirs.state_dict(), x.detach().permute(0, 2, 3, 1))
    out, (quantized, loss, info) = ours(x), theirs(x)
    indices = info["min_encoding_indices"] if isinstance(info, dict) else info[2]
    assert torch.equal(out.indices, indices.view(2, 10, 12))
    assert torch.equal(ours.encode(x), out.indices)
    # A product with rows of one 1 is exact.
    decoded = getattr(theirs, decode)(indices.flatten(), (2, 10, 12, 8))
    assert torch.equal(ours.decode(out.indices), decoded)
    # There, x + (code - x) in two roundings; here the code itself.
    assert_rounded(out.quantized, quantized, 2, largest(x, codes))
    # The same squares in another order: a sum in blocks of n numbers takes about log2(n) = 11
    # roundings, a mean one more, and there are two terms.
    assert_rounded(out.loss, loss, 24, largest(loss))
    direction = torch.randn_like(x)
    ours_grad = torch.autograd.grad((out.quantized * direction).sum() + out.loss, (x, codes))
    their_grad = torch.autograd.grad(
        (quantized * direction).sum() + loss, (x, theirs.embedding.weight)
    )
    # Of a token, the direction and what the loss adds: a difference, two factors, a sum.
    assert_rounded(ours_grad[0], their_grad[0], 4, their_grad[0].abs().max())
    # Of a code, the sum over its tokens, of which none has more than a quarter of the 240.
    assert out.indices.flatten().bincount().max() <= 60
    assert_rounded(ours_grad[1], their_grad[1], 60, their_grad[1].abs().max())


def test_from_encodec():
    theirs = encodec().ResidualVectorQuantizer(dimension=8, n_q=4, bins=16).train()
    for _ in range(2):  # k-means and two steps of the moving average
        theirs(torch.randn(2, 8, 300), sample_rate=1000)
    ours = interop.from_encodec(theirs.state_dict())
    codes = [table.codes().detach() for table in ours.codebooks]
    assert not any((table == 0).all() for table in codes)
    x = torch.randn(2, 8, 25)
    last = x.transpose(1, 2)
    assert_decided(interop.from_encodec, theirs.state_dict(), last)
    out, found = ours(last), theirs.eval()(x, sample_rate=1000)
    assert torch.equal(out.indices, found.codes.permute(1, 2, 0))
    assert torch.equal(ours.encode(last).permute(2, 0, 1), theirs.encode(x, sample_rate=1000))
    # The same codes, added up in the same order.
    assert torch.equal(out.quantized, found.quantized.transpose(1, 2))
    decoded = theirs.decode(found.codes).transpose(1, 2)
    assert torch.equal(ours.decode(out.indices), decoded)
    # A lower bandwidth, of 4 bits a token and stage.
    lower = theirs.encode(x, sample_rate=1000, bandwidth=8.0)
    assert len(lower) == 2
    first = out.indices.clone()
    first[..., 2:] = -1
    assert torch.equal(first[..., :2], lower.permute(1, 2, 0))
    assert torch.equal(ours.decode(first), theirs.decode(lower).transpose(1, 2))
    # The loss exists in training alone; there the codes are learned by a moving average, so here
    # too. The call changes the codes after it used them.
    CodebookEMA(ours)
    out, found = ours(last), theirs.train()(x, sample_rate=1000)
    assert torch.equal(out.indices, found.codes.permute(1, 2, 0))
    # There each of four stages is rest + (code - rest), in two roundings, and is subtracted and
    # added in one each.
    size = largest(x, *codes)
    assert_rounded(out.quantized, found.quantized.transpose(1, 2), 4 * 4, size)
    # What is squared is off by as much, so its mean by at most twice that times its root; the
    # mean of 400 squares takes about 12 roundings.
    root = found.penalty.detach().sqrt()
    assert_rounded(out.loss, found.penalty, 2 * 4 * 4 + 12, size * root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["hooks", "plain"])
def test_from_dac(form, dtype):
    sizes = [2, 4, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `torch.nn.utils.weight_norm`
        theirs = dac().ResidualVectorQuantize(12, len(sizes), 16, sizes).to(dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)  # the lengths of the weights too, which are norms at first
    lengths = [(s.in_proj.weight_g, s.out_proj.weight_g) for s in theirs.quantizers]
    if form == "plain":
        for stage in theirs.quantizers:
            nn.utils.remove_weight_norm(stage.in_proj)
            nn.utils.remove_weight_norm(stage.out_proj)
    state = theirs.state_dict()
    assert len(state) == len(sizes) * (7 if form == "hooks" else 5)
    read = partial(interop.from_dac, strides=1)
    ours = read(state)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    x = torch.randn(2, 12, 25, dtype=dtype)
    last = x.transpose(1, 2)
    assert_decided(read, state, last)
    # The largest feature and projected feature of any stage: a sum of products is, by Cauchy, at
    # most the length of the row times that of the vector, and there is the bias. A rest is no
    # longer than `x` and what was taken from it.
    added, lowered = torch.zeros(()), torch.zeros(())
    for stage, (into, out_of) in zip(theirs.quantizers, lengths, strict=True):
        codes, rest = stage.codebook.weight, longest(last) + 12**0.5 * added
        lowered = torch.maximum(lowered, largest(into) * rest + largest(stage.in_proj.bias))
        added = added + largest(out_of) * longest(codes) + largest(stage.out_proj.bias)
    # On both sides, 4 for a weight from length and direction, 5 for a sum of at most 4 products
    # and a bias, 1 to add the stage up.
    roundings = 2 * (4 + 5 + 1)
    for training in (False, True):
        out, found = ours.train(training)(last), theirs.train(training)(x)
        quantized, indices, latents, commitment, codebook = found
        assert torch.equal(out.indices, indices.transpose(1, 2))
        # There the code is z + (code - z), in two more roundings.
        through = sum(largest(out_of) for _, out_of in lengths) * 2 * largest(latents)
        size = added + through
        assert_rounded(out.quantized, quantized.transpose(1, 2), roundings + 2, size)
        # Terms have no weights there; the training of it has those that are here.
        for name, term in (("commitment", 0.25 * commitment), ("codebook", codebook)):
            if dtype == torch.float64:
                # Terms are float32 here: rounded for each stage, when added up, and once there.
                assert_rounded(out.terms[name], term.float(), 2 * len(sizes) + 1, largest(term))
                continue
            # A projected vector is off by the roundings of 12 products and a bias, of its weight,
            # and of what was taken away before. Its square is off by twice that times the root
            # of the mean, in each stage; the root of the sum is no smaller.
            wrong = roundings + 2 * (4 + 13)
            size = lowered * len(sizes) * largest(term).sqrt()
            assert_rounded(out.terms[name], term, 2 * wrong, size)
    decoded = theirs.from_codes(indices)[0].transpose(1, 2)
    assert_rounded(ours.decode(out.indices), decoded, roundings, added)
    assert torch.equal(ours.encode(last), out.indices)
