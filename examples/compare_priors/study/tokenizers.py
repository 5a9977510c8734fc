"""Training and measuring a tokenizer."""

import torch
from torch import Tensor

from study.images import PIECES, Pair
from study.measures import effective_dimension, explained, judge, spectrum, surroundings
from study.networks import CHANNELS
from study.priors import Described, StructureAlone, Tokenizer
from study.quantizers import QUANTIZERS
from study.setting import (
    Setting,
    as_floats,
    objective,
    optimizer_for,
    parameters_of,
    parts_of,
    reports,
)
from study.table import TokenizerRow
from vqprior.metrics import CodebookUsage

LEARNING_RATE = 8e-4
BATCH = 16
START_BATCHES = 8  # that codebooks start from


def build(row: TokenizerRow) -> Tokenizer:
    """Makes the untrained tokenizer of a row."""
    torch.manual_seed(row.seed)
    quantizer = QUANTIZERS[row.quantizer].make(row.codebook_size)
    tokenizer = Tokenizer(row.prior, quantizer, stride=row.stride)
    return tokenizer.to(memory_format=torch.channels_last)


def train(row: TokenizerRow, setting: Setting) -> tuple[Tokenizer, dict]:
    """Trains the tokenizer of a row.

    Returns:
        The tokenizer, frozen, and a ``history`` of its losses and of the use of its codes.
    """
    choice = QUANTIZERS[row.quantizer]
    tokenizer = build(row).to(setting.device)
    batches = setting.images.batches(row.seed, BATCH)
    with torch.no_grad():
        seen = [_prepared(tokenizer, batches[number]) for number in range(-START_BATCHES, 0)]
    choice.start(tokenizer.meeting.codes.quantizer, torch.cat(seen).movedim(1, -1))
    rules = choice.make_rules(tokenizer.meeting.codes)
    optimizer, schedule = optimizer_for([tokenizer], LEARNING_RATE, row.steps)
    loss_of = objective(setting.device)
    usage = CodebookUsage(tokenizer.meeting.codes.codebook_size).to(setting.device)
    history, due = [], reports(row.steps)
    for step in setting.steps(row.steps, row.name):
        pair = batches[step]
        with setting.autocast():
            tokenized = tokenizer(pair.hr, pair.lr)
        out = tokenized.quantizer_output
        loss, terms = loss_of(tokenized.image.float(), pair.hr)
        terms = terms | tokenized.terms | out.terms
        optimizer.zero_grad(set_to_none=True)
        (loss + sum(tokenized.terms.values()) + out.loss).backward()
        optimizer.step()
        schedule.step()
        for rule in rules:
            rule.step(out)
        usage.update(out.indices)
        if step + 1 in due:
            history.append({"step": step + 1, **as_floats(terms), **used(usage)})
            usage.reset()
    tokenizer.eval().requires_grad_(requires_grad=False)
    return tokenizer, {"history": history}


@torch.no_grad()
def measure(tokenizer: Tokenizer, row: TokenizerRow, setting: Setting) -> tuple[dict, Tensor]:
    """Measures a tokenizer on images that it was not trained on.

    Returns:
        The measures, and the reconstructions. Of these, what ``judge`` says. ``bits_per_pixel`` of
        the codes, and ``structure_per_pixel``, numbers that are not quantized; ``psnr_8_bits`` if
        they are, to 8 bits. ``parameters`` without the codebooks. How codes are used. And of
        the vectors before quantization their ``spectrum`` and ``effective_dimension``, and the
        shares of their variance that quantization loses (``quantization_error``) and that a linear
        map of the low-resolution image explains (``explained``).
    """
    held_out = setting.images.held_out
    codes = tokenizer.meeting.codes
    usage = CodebookUsage(codes.codebook_size).to(setting.device)
    images, rounded, vectors = [], [], []
    lost = 0.0
    for pair in parts_of(held_out):
        described = tokenizer.describe(pair.hr, pair.lr)
        out = tokenizer.meeting(described.texture, described.structure)
        usage.update(out.indices)
        images.append(tokenizer.decoder(out.quantized))
        rounded.append(_reconstruct_rounded(tokenizer, described))
        prepared = tokenizer.meeting.prepare(described.texture, described.structure)
        lost += float((codes(prepared).quantized - prepared).square().sum())
        vectors.append(prepared.movedim(1, -1))
    rows = vectors[0].shape[1]
    flat = torch.cat(vectors).flatten(0, 2)
    photo_of = torch.arange(len(flat), device=flat.device) // (PIECES * rows**2)
    shares = spectrum(flat)
    alone = isinstance(tokenizer.meeting, StructureAlone)
    table = sum(parameters_of(codebook) for codebook in set(codes.codebooks))
    found = {
        **judge(torch.cat(images), held_out.hr),
        "bits_per_pixel": 0.0 if alone else tokenizer.bits_per_pixel,
        "parameters": parameters_of(tokenizer) - table,
        **used(usage),
        "quantization_error": lost / float((flat - flat.mean(dim=0)).square().sum()),
        "effective_dimension": effective_dimension(shares),
        "explained": explained(surroundings(held_out.lr, rows), flat, tested=photo_of % 2 == 1),
        "spectrum": shares.tolist(),
    }
    if tokenizer.structure.regressed and row.prior != "plain":
        found["structure_per_pixel"] = CHANNELS / row.stride**2
        found["psnr_8_bits"] = judge(torch.cat(rounded), held_out.hr)["psnr"]
    return found, torch.cat(images)


def used(usage: CodebookUsage) -> dict[str, float]:
    """How codes are used."""
    summary = usage.compute()
    return {"perplexity": summary.perplexity, "usage": summary.usage}


def _prepared(tokenizer: Tokenizer, pair: Pair) -> Tensor:
    described = tokenizer.describe(pair.hr, pair.lr)
    return tokenizer.meeting.prepare(described.texture, described.structure)


def _reconstruct_rounded(tokenizer: Tokenizer, described: Described) -> Tensor:
    """Reconstructs with the features of the structure rounded to 8 bits, 256 even levels each."""
    dims = (0, 2, 3)
    low = described.features.amin(dim=dims, keepdim=True)
    high = described.features.amax(dim=dims, keepdim=True)
    step = (high - low).clamp_min(1e-12) / 255
    features = ((described.features - low) / step).round() * step + low
    structure = tokenizer.structure.expand(features)
    return tokenizer.decoder(tokenizer.meeting(described.texture, structure).quantized)
