"""State dicts in the layouts of other projects, of small random numbers, and their readers."""

from functools import partial

import torch

from vqprior import interop

SCALES = (1, 2, 3, 4)


def numbers(*shape):
    return torch.randn(shape)


def taming():
    return {"embedding.weight": numbers(16, 6)}


def simvq():
    return {
        "embedding.weight": numbers(16, 6),
        "embedding_proj.weight": numbers(6, 6),
        "embedding_proj.bias": numbers(6),
    }


def encodec():
    state = {}
    for stage in range(3):
        name = f"vq.layers.{stage}._codebook."
        state[name + "inited"] = torch.ones(1)
        state[name + "cluster_size"] = torch.rand(16)
        state[name + "embed"] = numbers(16, 6)
        state[name + "embed_avg"] = numbers(16, 6)
    return state


def dac(form="hooks"):
    names = {
        "hooks": ("weight_g", "weight_v"),
        "parametrizations": (
            "parametrizations.weight.original0",
            "parametrizations.weight.original1",
        ),
    }
    state = {}
    for stage, inner in enumerate((2, 4, 2)):
        for projection, sizes in (("in_proj", (inner, 6)), ("out_proj", (6, inner))):
            name = f"quantizers.{stage}.{projection}."
            state[name + "bias"] = numbers(sizes[0])
            if form == "plain":
                state[name + "weight"] = numbers(*sizes, 1)
            else:
                length, direction = names[form]
                state[name + length] = torch.rand(sizes[0], 1, 1) + 0.5
                state[name + direction] = numbers(*sizes, 1)
        state[f"quantizers.{stage}.codebook.weight"] = numbers(16, inner)
    return state


def var(form="partially"):
    state = {"embedding.weight": numbers(16, 6), "ema_vocab_hit_SV": torch.zeros(len(SCALES), 16)}
    names = {
        "partially": [f"quant_resi.qresi_ls.{number}." for number in range(4)],
        "none": [f"quant_resi.{number}." for number in range(len(SCALES))],
        "fully": ["quant_resi.qresi."],
        "without": [],
    }[form]
    for name in names:
        state[name + "weight"] = numbers(6, 6, 3, 3) / 4
        state[name + "bias"] = numbers(6)
    return state


def vqp_codebook(name="_codebook", codebooks=1, size=16):
    return {
        f"{name}.initted": torch.tensor(True),
        f"{name}.cluster_size": torch.rand(codebooks, size),
        f"{name}.embed_avg": numbers(codebooks, size, 6),
        f"{name}.embed": numbers(codebooks, size, 6),
    }


def vqp_projections(inner=6, before=""):
    return {
        f"{before}project_in.weight": numbers(inner, 8),
        f"{before}project_in.bias": numbers(inner),
        f"{before}project_out.weight": numbers(8, inner),
        f"{before}project_out.bias": numbers(8),
    }


def vqp_normalized():
    state = vqp_codebook() | vqp_projections()
    for part in ("weight", "bias"):
        state[f"project_in.0.{part}"] = state.pop(f"project_in.{part}")
        state[f"project_in.1.{part}"] = numbers(6)
    return state


def vqp_residual(before=""):
    state = vqp_projections(before=before)
    for layer in range(3):
        state |= vqp_codebook(f"{before}layers.{layer}._codebook", size=16 + layer)
    return state


def vqp_sim():
    return {"frozen_codebook": numbers(16, 4), "code_transform.weight": numbers(6, 4)}


def vqp_lfq():
    return {"mask": torch.tensor([32, 16, 8, 4, 2, 1]), **vqp_projections()}


from_taming = partial(interop.from_taming, metric="euclidean")
from_normalized_taming = partial(interop.from_taming, metric="cosine")
from_ibq = partial(interop.from_taming, metric="dot")
from_dac = partial(interop.from_dac, strides=1)
from_small_var = partial(interop.from_var, metric="euclidean", scales=SCALES)
from_small_fsq = partial(interop.from_vqp_fsq, levels=[3, 4, 5, 3, 4, 5], residual=False)
from_spherical_lfq = partial(interop.from_vqp_lfq, spherical=True)


LAYOUTS = {
    "taming": (from_taming, taming),
    "taming-normalized": (from_normalized_taming, taming),
    "taming-dot": (from_ibq, taming),
    "simvq": (interop.from_simvq, simvq),
    "encodec": (interop.from_encodec, encodec),
    "dac": (from_dac, dac),
    "dac-parametrizations": (from_dac, lambda: dac("parametrizations")),
    "dac-plain": (from_dac, lambda: dac("plain")),
    "var": (from_small_var, var),
    "var-none": (from_small_var, lambda: var("none")),
    "var-fully": (from_small_var, lambda: var("fully")),
    "var-without": (from_small_var, lambda: var("without")),
    "vqp-vq": (interop.from_vqp_vector_quantize, vqp_codebook),
    "vqp-vq-heads": (interop.from_vqp_vector_quantize, lambda: vqp_codebook(codebooks=2)),
    "vqp-vq-projected": (
        interop.from_vqp_vector_quantize,
        lambda: vqp_codebook() | vqp_projections(),
    ),
    "vqp-vq-normalized": (interop.from_vqp_vector_quantize, vqp_normalized),
    "vqp-residual": (interop.from_vqp_residual_vq, vqp_residual),
    "vqp-grouped": (
        interop.from_vqp_grouped_residual_vq,
        lambda: vqp_residual("rvqs.0.") | vqp_residual("rvqs.1."),
    ),
    "vqp-sim": (interop.from_vqp_sim_vq, vqp_sim),
    "vqp-fsq": (from_small_fsq, vqp_projections),
    "vqp-lfq": (interop.from_vqp_lfq, vqp_lfq),
    "vqp-lfq-spherical": (from_spherical_lfq, vqp_lfq),
}
