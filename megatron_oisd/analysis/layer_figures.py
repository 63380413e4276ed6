"""Figures of layer studies: the logit-lens map, every measure by layer, and layers over a training run.

Layers are counted from 1 in every figure.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_oisd.analysis.layer_study import LayerStudy, LensMap
from megatron_oisd.analysis.plotting import COLOURS, NEUTRAL, save_figure
from megatron_oisd.analysis.recommend import Recommendation
from megatron_oisd.errors import OISDError

LONGEST_TOKEN = 8
"""Characters of a token that a cell shows."""


def draw_lens_map(lens: LensMap, output: str | Path, *, title: str = "") -> list[Path]:
    """Draw tokens by layers: each cell the layer's most probable next token, its colour that token's probability.

    Bold cells name the token that the last layer names. Returns the PNG and the SVG.
    """
    layers, positions = len(lens.top_tokens), len(lens.tokens)

    def fill(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(
            np.asarray(lens.probabilities), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower",
            extent=(-0.5, positions - 0.5, 0.5, layers + 0.5), interpolation="nearest",
        )  # fmt: skip
        for layer, (row, probabilities) in enumerate(zip(lens.top_tokens, lens.probabilities, strict=True), start=1):
            for place, (token, probability) in enumerate(zip(row, probabilities, strict=True)):
                same = token == lens.top_tokens[-1][place]
                axes.text(
                    place, layer, printable(token), ha="center", va="center", fontsize=6.2,
                    fontweight="bold" if same else "normal", color="white" if probability > 0.55 else "#222222",
                )  # fmt: skip
        labels = [f"{printable(token)}\n{lens.first_position + place + 1}" for place, token in enumerate(lens.tokens)]
        axes.set_xticks(range(positions), labels, fontsize=6.5)
        # Lines between the cells.
        axes.set_xticks(np.arange(positions - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(1, layers) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        step = max(1, math.ceil(layers / 40))
        axes.set_yticks(range(1, layers + 1, step))
        axes.tick_params(which="both", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(
            "token and its position, from 1; cells name the token predicted to follow (bold: as in the last layer)"
        )
        axes.set_ylabel("layer")
        axes.set_title(title or f"Logit lens, sample {lens.sample}")
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
        bar.set_label("probability of that token")
        bar.outline.set_visible(False)

    return save_figure(fill, output, (2.2 + 0.5 * positions, 1.4 + 0.24 * layers))


def draw_layers(study: LayerStudy, advice: Recommendation | None, output: str | Path) -> list[Path]:
    """Draw every measure by layer with 95% intervals over samples, and the recommended layer. Returns PNG and SVG."""
    values = study.measures

    def fill(figure: Any) -> None:
        grid = figure.subplots(2, 3).ravel()
        entropies = {
            "residual after FFN": values["entropy/residual"],
            "residual after attention": values["entropy/after_attention"],
        }
        _lines(grid[0], study, entropies, "Entropy through the final norm", "nats")
        modules = {
            "attention output": values["entropy/attention_output"],
            "FFN output": values["entropy/ffn_output"],
            "FFN input": values["entropy/ffn_input"],
        }
        _lines(grid[1], study, modules, "Entropy of what modules read and write", "nats")
        for axes in grid[:2]:
            axes.axhline(math.log(study.vocab_size), color=NEUTRAL, linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
            axes.set_ylim(0, 1.08 * math.log(study.vocab_size))
        grid[0].text(study.num_layers, math.log(study.vocab_size), "uniform ", va="bottom", ha="right", color=NEUTRAL)
        changes = {
            "attention": values["entropy/attention_output"] - values["entropy/attention_input"],
            "FFN": values["entropy/ffn_output"] - values["entropy/ffn_input"],
        }
        _lines(grid[2], study, changes, "Entropy change in modules (BuPO)", "output - input (nats)", zero=True)
        residual = {
            "attention": values["entropy/after_attention"] - values["entropy/layer_input"],
            "FFN": values["entropy/residual"] - values["entropy/after_attention"],
        }
        _lines(grid[3], study, residual, "Entropy change of the residual stream", "after - before (nats)", zero=True)
        _lines(grid[4], study, {"": values["js/teacher"]}, "Distance to final policy", "JS (nats)")
        _lines(grid[5], study, {"": values["js/attention"]}, "Distance to last layer's attention", "JS (nats)")
        for axes in grid[4:]:
            axes.set_ylim(bottom=0)
        if advice is not None and advice.layer is not None:
            for axes in grid:
                axes.axvline(advice.layer, color=COLOURS[3], linewidth=1.2, alpha=0.7, zorder=1)
            where = grid[2] if advice.rule == "module" else grid[3]
            where.annotate(
                f"layer {advice.layer}", (advice.layer, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
                textcoords="offset points", color=COLOURS[3], ha="left", va="top",
            )  # fmt: skip
        what = "response positions" if study.response_only else "all positions"
        count = len(study.samples)
        band = "Band: 95% CI over samples. " if count > 1 else ""
        figure.supxlabel(
            f"{study.label}: mean over {what} of {count} sample{'s' * (count > 1)}. {band}"
            + (f"Vertical line: recommended layer, rule {advice.rule}." if advice and advice.layer else ""),
            fontsize=8, color=NEUTRAL, x=0.01, ha="left",
        )  # fmt: skip

    return save_figure(fill, output, (10.5, 5.6))


def draw_training(studies: Sequence[LayerStudy], output: str | Path) -> list[Path]:
    """Draw, over the checkpoints of a run, how close each layer is to the last one: attention, and policy.

    Similarity is 1 - JS / ln 2: 1 for the same distribution, 0 for distributions without anything in common. Returns
    the PNG and the SVG.

    Raises:
        OISDError: fewer than two checkpoints, or models of different depth.
    """
    if len(studies) < 2:
        raise OISDError(f"layers over training need two checkpoints at least, got {len(studies)}; save more of them")
    if len({study.num_layers for study in studies}) > 1:
        raise OISDError("the checkpoints have different numbers of layers: they are not of one run")
    kinds = {"js/attention": "Attention similarity to last layer", "js/teacher": "Policy similarity to final policy"}

    def fill(figure: Any) -> None:
        import matplotlib as mpl

        layers = np.arange(1, studies[0].num_layers)
        labels = [study.label if study.step is None else str(study.step) for study in studies]
        shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(studies)))
        grid = figure.subplots(2, 2, width_ratios=[1.25, 1])
        for (lines, changes), (name, title) in zip(grid, kinds.items(), strict=True):
            table = np.array([1 - study.measures[name].mean(axis=0)[:-1] / math.log(2) for study in studies])
            for row, colour, label in zip(table, shades, labels, strict=True):
                lines.plot(layers, row, "o-", markersize=3, linewidth=1.3, color=colour, label=label)
            lines.set_xlim(0.6, len(layers) + 0.4)
            lines.set_title(title)
            lines.set_ylabel("1 - JS / ln 2")
            delta = table[1:] - table[0]
            most = float(np.abs(delta).max()) or 1e-12
            image = changes.imshow(
                delta.T, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower", interpolation="nearest",
                extent=(0.5, len(studies) - 0.5, 0.5, len(layers) + 0.5),
            )  # fmt: skip
            shown = range(1, len(studies), max(1, math.ceil((len(studies) - 1) / 8)))
            changes.set_xticks(shown, [labels[number] for number in shown])
            changes.set_title(f"Change since step {labels[0]}")
            changes.set_xlabel("training step")
            changes.set_ylabel("layer")
            bar = figure.colorbar(image, ax=changes, pad=0.02)
            bar.set_label("gained (blue), lost (red)")
            bar.outline.set_visible(False)
            lines.set_xlabel("layer")
            for axis in (lines.xaxis, changes.yaxis):
                axis.get_major_locator().set_params(integer=True)
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, title="training step", loc="outside right upper", frameon=False)
        figure.supxlabel(
            f"Mean over {len(studies[0].samples)} samples. The last layer is left out: it is 1.",
            fontsize=8, color=NEUTRAL, x=0.01, ha="left",
        )  # fmt: skip

    return save_figure(fill, output, (9.2, 5.6))


def printable(token: str) -> str:
    """A token for a cell: spaces and line ends made visible, control characters left out, cut to a few characters."""
    text = token.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    text = "".join(c if unicodedata.category(c)[0] != "C" else "�" for c in text)
    text = text if len(text) <= LONGEST_TOKEN else text[: LONGEST_TOKEN - 1] + "…"
    return text.replace("$", r"\$")  # matplotlib would read mathematics


def interval(values: NDArray[np.float64], *, resamples: int = 2000) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95% percentile bootstrap of the mean over the first axis of ``[samples, layers]``; seeded."""
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975], axis=0)
    return low, high


def _lines(
    axes: Any,
    study: LayerStudy,
    curves: Mapping[str, NDArray[np.float64]],
    title: str,
    ylabel: str,
    *,
    zero: bool = False,
) -> None:
    layers = np.arange(1, study.num_layers + 1)
    if zero:
        axes.axhline(0, color=NEUTRAL, linewidth=0.7, zorder=1)
    for colour, (label, values) in zip(COLOURS, curves.items(), strict=False):
        if len(values) > 1:
            axes.fill_between(layers, *interval(values), color=colour, alpha=0.18, linewidth=0)
        axes.plot(layers, values.mean(axis=0), "o-", markersize=2.8, linewidth=1.3, color=colour, label=label)
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.set_xlabel("layer")
    axes.set_xlim(0.6, study.num_layers + 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1:
        axes.legend(fontsize=7.5, framealpha=0.85, edgecolor="none")
