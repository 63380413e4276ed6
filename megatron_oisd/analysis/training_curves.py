"""The training figure: how reward, the two OISD losses and the usual health signs went, several runs overlaid.

Reads the records of ``metrics.jsonl`` (:func:`megatron_oisd.rl.metrics_log.read_metrics`) and the ``table.json`` of an
evaluation (:func:`megatron_oisd.rl.evaluate.write_table`). Colour tells runs apart, the kind of line tells layers
apart; a panel whose metrics no run has is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_oisd.analysis.plotting import COLOURS, NEUTRAL, save_figure
from megatron_oisd.errors import OISDError

LINE_KINDS: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Panel:
    """One axes: ``key`` is a metric name, or for ``per_layer`` the part before ``layer_<l>`` (l counted from 1)."""

    title: str
    ylabel: str
    key: str
    per_layer: bool = False
    zero_line: bool = False
    from_zero: bool = False
    allow_log: bool = False


WEIGHTED = "advantage-weighted JS (nats)"
PANELS = (
    Panel("Training reward", "mean over rollouts", "critic/rewards/mean"),
    Panel("Logit alignment, $L_{\\mathrm{think}}$", WEIGHTED, "oisd/think/", per_layer=True, zero_line=True),
    Panel("Attention alignment, $L_{\\mathrm{attn}}$", WEIGHTED, "oisd/attn/", per_layer=True, zero_line=True),
    Panel("Distance to final distribution", "JS, unsigned (nats)", "oisd/js/", per_layer=True, from_zero=True),
    Panel("Distance to last layer's attention", "JS, unsigned (nats)", "oisd/attn_js/", per_layer=True, from_zero=True),
    Panel("Policy entropy", "nats per token", "actor/entropy", from_zero=True),
    Panel("Response length", "mean (tokens)", "response_length/mean", from_zero=True),
    Panel("Gradient norm", "norm before clipping", "actor/grad_norm", from_zero=True, allow_log=True),
)


@dataclass(frozen=True)
class Curve:
    """One line of a panel: ``steps`` and ``values`` are [points], NaN where the run logged a non-finite value."""

    run: str
    layer: int | None
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


def collect_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], panel: Panel) -> list[Curve]:
    """Return the lines of ``panel`` in the order of runs, then layers; those without one finite value are left out."""
    curves = []
    for run, records in runs.items():
        names = {name for record in records for name in record}
        if panel.per_layer:
            pattern = re.compile(re.escape(panel.key) + r"layer_(\d+)")
            found = {int(match.group(1)): name for name in names if (match := pattern.fullmatch(name))}
            wanted: list[tuple[int | None, str]] = [*sorted(found.items())]
        else:
            wanted = [(None, panel.key)]
        for layer, name in wanted:
            points = [
                (record["step"], math.nan if record[name] is None else record[name])
                for record in records
                if name in record
            ]
            if not any(math.isfinite(value) for _, value in points):
                continue
            steps, values = np.asarray(points, dtype=np.float64).T
            curves.append(Curve(run, layer, steps, values))
    return curves


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean of the last ``window`` finite values at each point; NaN where there is none.

    It looks back only, so the newest points do not change when training goes on.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    starts = np.maximum(np.arange(len(values)) + 1 - window, 0)
    number = counts[1:] - counts[starts]
    return np.where(number > 0, (sums[1:] - sums[starts]) / np.maximum(number, 1), math.nan)


def draw(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], output: str | Path, evaluation: Mapping[str, Any] | None = None
) -> list[Path]:
    """Draw the figure and write it as PNG and SVG.

    Args:
        runs: label to the records of that run, for example ``{"OISD": [...], "GRPO": [...]}``.
        output: where; an ending ``.png`` or ``.svg`` is left off, as both are written.
        evaluation: the content of an evaluation's ``table.json``; None leaves the held-out panel out.

    Returns:
        The two files.

    Raises:
        OISDError: matplotlib is missing, there is nothing to draw, or ``evaluation`` is something else.
    """
    panels = [(panel, curves) for panel in PANELS if (curves := collect_curves(runs, panel))]
    bars = _evaluation_rows(evaluation)
    if not panels and not bars:
        raise OISDError(f"nothing to draw: runs {', '.join(runs) or 'none'} hold none of the metrics this figure shows")
    colours = {run: COLOURS[index % len(COLOURS)] for index, run in enumerate(runs)}
    layers = sorted({curve.layer for _, curves in panels for curve in curves if curve.layer is not None})
    kinds = {layer: (LINE_KINDS[index % len(LINE_KINDS)], index / len(layers)) for index, layer in enumerate(layers)}
    longest = max((len(curve.steps) for _, curves in panels for curve in curves), default=0)
    window = max(1, longest // 20)

    number = len(panels) + bool(bars)
    columns = min(3, number)
    rows = math.ceil(number / columns)

    def fill(figure: Any) -> None:
        remaining = iter(figure.subplots(rows, columns, squeeze=False).ravel())
        # The held-out result stands beside the training reward: the two are read together.
        at_bar = 1 if panels and panels[0][0].key == "critic/rewards/mean" else 0
        for index, (panel, curves) in enumerate(panels):
            if bars and index == at_bar:
                _draw_bars(next(remaining), bars, colours)
            _draw_panel(next(remaining), panel, curves, colours, kinds, window)
        if bars and at_bar >= len(panels):
            _draw_bars(next(remaining), bars, colours)
        for axes in remaining:
            axes.set_visible(False)
        _annotate(figure, runs, colours, window, bool(panels))

    return save_figure(fill, output, (3.5 * columns, 2.5 * rows + 0.6))


def _annotate(figure: Any, runs: Mapping[str, Any], colours: Mapping[str, str], window: int, curves: bool) -> None:
    from matplotlib.lines import Line2D

    figure.align_ylabels()
    if not curves:
        return
    handles = [Line2D([], [], color=colours[run], linewidth=2, label=run) for run in runs]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(handles)), frameon=False, fontsize=10)
    if window > 1:
        text = f"Faint: every step. Strong: mean of the last {window} logged steps (geometric on a log scale)."
        figure.supxlabel(text, fontsize=8, color=NEUTRAL, x=0.01, ha="left")


def _draw_panel(
    axes: Any,
    panel: Panel,
    curves: Sequence[Curve],
    colours: Mapping[str, str],
    kinds: Mapping[int, tuple[Any, float]],
    window: int,
) -> None:
    if panel.zero_line:
        axes.axhline(0, color=NEUTRAL, linewidth=0.7, zorder=1)
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    log_scale = bool(panel.allow_log and values.min() > 0 and values.max() > 30 * values.min())
    ends = []
    for curve in curves:
        kind, lightness = kinds[curve.layer] if curve.layer is not None else ("-", 0.0)
        colour = _lighter(colours[curve.run], 0.6 * lightness)
        strong = np.exp(smooth(np.log(curve.values), window)) if log_scale else smooth(curve.values, window)
        if window > 1:
            alpha = 0.3 if curve.layer is None else 0.18
            axes.plot(curve.steps, curve.values, color=colour, linewidth=0.6, alpha=alpha, zorder=2)
        marker = "o" if len(curve.steps) == 1 else None
        axes.plot(
            curve.steps, strong, color=colour, linestyle=kind, linewidth=1.5, marker=marker, markersize=3, zorder=3
        )
        if curve.layer is not None:
            ends.append((float(strong[np.isfinite(strong)][-1]), f"layer {curve.layer}", colour))
    axes.set_title(panel.title)
    axes.set_xlabel("training step")
    axes.set_ylabel(panel.ylabel)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if log_scale:
        axes.set_yscale("log")
        axes.set_ylabel(f"{panel.ylabel} (log scale)")
    elif panel.from_zero and values.min() >= 0:
        axes.set_ylim(bottom=0)
    _label_ends(axes, ends)


def _lighter(colour: str, amount: float) -> str:
    """Mix a ``#rrggbb`` colour with white; 0 keeps it, 1 is white."""
    parts = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * amount):02x}" for part in parts)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name the lines at their right end, pushed apart where they end close to each other."""
    if not ends:
        return
    gap = 0.085  # of the axes' height: one line of text
    low, high = axes.get_ylim()
    ordered = sorted((((value - low) / (high - low)), text, colour) for value, text, colour in ends)
    heights = [place for place, _, _ in ordered]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    # Pushing only upwards would shift the group; move it back to the lines' own mean height.
    shift = sum(place for place, _, _ in ordered) / len(ordered) - sum(heights) / len(heights)
    for height, (_, text, colour) in zip(heights, ordered, strict=True):
        axes.text(
            1.01, height + shift, text, color=colour, transform=axes.transAxes, va="center", ha="left", fontsize=7.5
        )


def _evaluation_rows(evaluation: Mapping[str, Any] | None) -> list[tuple[str, int, float, float, float]]:
    """Return (label, K, mean, low, high) for each evaluated model."""
    if evaluation is None:
        return []
    try:
        return [
            (label, int(row["samples_per_prompt"]), float(row["avg_at_k"]), *map(float, row["avg_at_k_interval"]))
            for label, row in evaluation["results"].items()
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OISDError("the evaluation is not the table.json that tools/evaluate.py writes; give that file") from error


def _draw_bars(axes: Any, bars: Sequence[tuple[str, int, float, float, float]], colours: Mapping[str, str]) -> None:
    counts = {count for _, count, _, _, _ in bars}
    for place, (label, count, mean, low, high) in enumerate(bars):
        axes.bar(place, 100 * mean, width=0.6, color=colours.get(label, NEUTRAL), alpha=0.85, zorder=2)
        axes.errorbar(
            place, 100 * mean, yerr=[[100 * (mean - low)], [100 * (high - mean)]], color="black", capsize=3, linewidth=1
        )
        text = f"{100 * mean:.1f}" if len(counts) == 1 else f"{100 * mean:.1f}\n(K={count})"
        where = {"xy": (place, 100 * high), "xytext": (0, 4), "textcoords": "offset points"}
        axes.annotate(text, **where, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [label for label, *_ in bars])
    axes.set_title("Held-out accuracy")
    axes.set_ylabel(f"Avg@{counts.pop()} (%), 95% CI" if len(counts) == 1 else "Avg@K (%), 95% CI")
    axes.set_xlim(-0.7, len(bars) - 0.3)
    axes.set_ylim(0, max(1.0, 118 * max(high for *_, high in bars)))
