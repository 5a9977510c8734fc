"""Finished rows as plots."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.summary import Finished, Group, grouped, label
from study.table import PREDICTED, PredictorRow, TokenizerRow, family_of

Plot = Callable[[dict[str, list[Finished]]], Figure | None]
COLORS = {
    "plain": "tab:gray",
    "skip": "tab:orange",
    "texture": "tab:blue",
    "texture-lr": "tab:green",
    "structure": "tab:cyan",
    "structure-lr": "tab:olive",
}
FOLLOWED = (
    "code-longer", "rap", "rap-lr-4e-4", "rap-keep-code-0.01", "rap-distance", "soft", "gumbel",
    "reinmax",
)  # fmt: skip
FAMILIES = {
    "tokenizers": "k*", "codes alone": "ko", "images alone": "rs", "images and codes": "g^",
}  # fmt: skip
NAMED = (
    "code-100", "code", "code-distance", "code-patient", "rap", "rap-lr-2e-5", "rap-patient",
    "rap-keep-code-0.01", "rap-patient-keep-code-0.01", "rap-distance", "rap-from-start",
    "rap-temperature-4", "soft", "gumbel", "reinmax", "reinmax-keep-code-0.01", "end-to-end",
    "nearest",
)  # fmt: skip


def plots(found: dict[str, list[Finished]]) -> dict[str, Figure]:
    """Returns every plot that there are rows for, by name."""
    made = {
        "sizes": _sizes(grouped(found["sizes"])),
        "features": _features(grouped(found["sizes"])),
        "equal-bits": _equal_bits(grouped(found["equal-bits"])),
        "prediction": _prediction(grouped(found["prediction"])),
        "training": _training(grouped(found["prediction"])),
        "gradients": _gradients(grouped(found["gradients"])),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def _by_prior(groups: list[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.row.codebook_size):
        found.setdefault(group.row.prior, []).append(group)
    return found


def _sizes(groups: list[Group]) -> Figure | None:
    """What a codebook of how many codes gives: in pixels, in texture, and for its bits."""
    if not groups:
        return None
    figure, panels = _panels(3)
    shown = (
        ("psnr", "codebook_size", "reconstruction PSNR-Y (dB)", "codes"),
        ("frechet", "codebook_size", "Frechet distance of texture", "codes"),
        ("quantization_error", "bits", "variance lost by quantization", "bits for each code"),
    )
    for panel, (name, against, title, across) in zip(panels, shown, strict=True):
        for prior, ones in _by_prior(groups).items():
            alone = prior.startswith("structure")
            if alone and name == "quantization_error":
                continue
            means = [group.mean(name) for group in ones]
            if alone:
                panel.axhline(means[0], color=COLORS[prior], linestyle=":", label=prior)
                continue
            sizes = [group.row.codebook_size for group in ones]
            places = sizes if against == "codebook_size" else [s.bit_length() - 1 for s in sizes]
            spreads = [group.spread(name) for group in ones]
            panel.errorbar(
                places, means, spreads, color=COLORS[prior], marker="o", capsize=3, label=prior
            )
        panel.set(title=title, xlabel=across)
        if against == "codebook_size":
            panel.set_xscale("log", base=2)
        else:
            panel.set_yscale("log", base=2)
    panels[0].legend(fontsize=8)
    return figure


def _features(groups: list[Group]) -> Figure | None:
    """What is quantized, and how codes are used while they learn."""
    groups = [group for group in groups if not group.row.prior.startswith("structure")]
    groups = [group for group in groups if group.values("spectrum")]
    if not groups:
        return None
    figure, panels = _panels(3)
    for prior, ones in _by_prior(groups).items():
        chosen = next((g for g in ones if g.row.codebook_size == PREDICTED), ones[0])
        color = COLORS[prior]
        spectrum = [sum(s) / len(s) for s in zip(*chosen.values("spectrum"), strict=True)]
        panels[0].plot(range(1, len(spectrum) + 1), spectrum, color=color, label=prior)
        for panel, name in zip(panels[1:], ("perplexity", "usage"), strict=True):
            for group, style in zip((ones[0], ones[-1]), ("--", "-"), strict=True):
                (curve, *_) = group.values("history")
                size = group.row.codebook_size
                scale = size if name == "perplexity" else 1
                panel.plot(
                    [point["step"] for point in curve],
                    [point[name] / scale for point in curve],
                    color=color, linestyle=style, label=f"{prior}, {size} codes",
                )  # fmt: skip
    panels[0].set(
        title="spectrum of what is quantized", xlabel="component", ylabel="share", yscale="log",
        xscale="log",
    )  # fmt: skip
    panels[1].set(title="perplexity / codes", xlabel="step")
    panels[2].set(title="share of codes in use", xlabel="step")
    panels[0].legend(fontsize=8)
    panels[1].legend(fontsize=6)
    return figure


def _equal_bits(groups: list[Group]) -> Figure | None:
    """Other quantizers, with and without structure."""
    if not groups:
        return None
    figure, panels = _panels(2)
    names = list(dict.fromkeys(group.row.quantizer for group in groups))
    for panel, name, title in zip(
        panels,
        ("psnr", "frechet"),
        ("reconstruction PSNR-Y (dB)", "Frechet distance of texture"),
        strict=True,
    ):
        for prior in dict.fromkeys(group.row.prior for group in groups):
            ones = [group for group in groups if group.row.prior == prior]
            panel.errorbar(
                [names.index(group.row.quantizer) for group in ones],
                [group.mean(name) for group in ones],
                [group.spread(name) for group in ones],
                color=COLORS[prior], marker="o", linestyle="", capsize=3, label=prior,
            )  # fmt: skip
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.set(title=title)
    panels[0].legend(fontsize=8)
    return figure


def _prediction(groups: list[Group]) -> Figure | None:
    """Accuracy against images, and pixels against textures."""
    trained = [group for group in groups if isinstance(group.row, PredictorRow)]
    if not trained:
        return None
    figure, panels = _panels(2)
    limits = [group for group in groups if isinstance(group.row, TokenizerRow)]
    shown = ((trained, "accuracy", "psnr"), (trained + limits, "psnr", "frechet"))
    for panel, (ones, across, up) in zip(panels, shown, strict=True):
        for family, marker in FAMILIES.items():
            members = [group for group in ones if family_of(group.row) == family]
            members = [group for group in members if group.mean(across) is not None]
            places = [(group.mean(across), group.mean(up)) for group in members]
            panel.plot([x for x, _ in places], [y for _, y in places], marker, ms=5, label=family)
            for group, place in zip(members, places, strict=True):
                if family == "tokenizers" or group.row.method in NAMED:
                    name = label(group.row)
                    panel.annotate(name, place, (3, 3), textcoords="offset points", size=6)
    panels[0].set(title="all trainings", xlabel="share of right codes", ylabel="PSNR-Y (dB)")
    panels[1].set(title="all trainings", xlabel="PSNR-Y (dB)", ylabel="Frechet distance of texture")
    panels[1].legend(fontsize=7)
    return figure


def _training(groups: list[Group]) -> Figure | None:
    """How accuracy and images change in training."""
    followed = [group for group in groups if getattr(group.row, "method", None) in FOLLOWED]
    curves = {group.row.method: group.values("history") for group in followed}
    curves = {method: found[0] for method, found in curves.items() if found}
    if not curves:
        return None
    figure, panels = _panels(2)
    for method, curve in curves.items():
        for panel, name in zip(panels, ("psnr", "accuracy"), strict=True):
            panel.plot(
                [point["step"] for point in curve],
                [point[name] for point in curve],
                label=method,
            )
    panels[0].set(title="PSNR-Y (dB) of 16 images", xlabel="step")
    panels[1].set(title="share of right codes", xlabel="step")
    panels[0].legend(fontsize=7)
    return figure


def _gradients(groups: list[Group]) -> Figure | None:
    """How near estimates are to the exact gradient, and how long that is, by confidence."""
    if not groups:
        return None
    figure, panels = _panels(2)
    places = [place for group in groups for result in group.results for place in result["places"]]
    sure = [place["confidence"] for place in places]
    for name in ("straight_through", "soft", "reinmax"):
        panels[0].plot(sure, [place[name]["cosine"] for place in places], ".", ms=4, label=name)
        lengths = [place[name]["norm"] * place["exact"] for place in places]
        panels[1].plot(sure, lengths, ".", ms=4, label=name)
    panels[1].plot(sure, [place["exact"] for place in places], "k.", ms=4, label="exact")
    panels[0].set(title="cosine to the exact gradient", xlabel="confidence")
    panels[1].set(title="length of the gradient", xlabel="confidence", yscale="log")
    for panel in panels:
        panel.legend(fontsize=8)
    return figure
