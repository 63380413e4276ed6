"""Figures that compare evaluated models: Pass@K curves and ablation bars, from ``table.json`` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_oisd.analysis.evaluation import read_tables
from megatron_oisd.analysis.plotting import COLOURS, NEUTRAL, save_figure


def draw_pass_at_k(tables: Mapping[str, str | Path], output: str | Path) -> list[Path]:
    """Draw unbiased Pass@K over K, one panel for each problem set, one line for each model. Returns PNG and SVG.

    Raises:
        OISDError: matplotlib or a table is missing.
    """
    found = read_tables(tables)
    colours = _colours(found)

    def fill(figure: Any) -> None:
        grid = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (name, results) in zip(grid, found.items(), strict=True):
            for label, summary in results.items():
                points = sorted((int(k), 100 * value) for k, value in summary["pass_at_k"].items())
                axes.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=colours[label], label=label)
            axes.set_title(f"{name} ({next(iter(results.values()))['num_problems']} problems)")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set_xlabel("number of samples K")
        grid[0].set_ylabel("Pass@K, unbiased (%)")
        handles = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside upper left", ncols=6, frameon=False)

    return save_figure(fill, output, (0.6 + 3.2 * len(found), 3.0))


def draw_ablation(tables: Mapping[str, str | Path], output: str | Path) -> list[Path]:
    """Draw Avg@K with 95% intervals, a group of bars for each problem set, a bar for each model. Returns PNG and SVG.

    Raises:
        OISDError: matplotlib or a table is missing.
    """
    found = read_tables(tables)
    colours = _colours(found)
    width = min(0.84 / len(colours), 0.28)

    def fill(figure: Any) -> None:
        axes = figure.subplots()
        highest = 1.0
        for group, results in enumerate(found.values()):
            for number, label in enumerate(colours):
                if label not in results:
                    continue
                value = 100 * results[label]["avg_at_k"]
                low, high = (100 * bound for bound in results[label]["avg_at_k_interval"])
                place = group + (number - (len(colours) - 1) / 2) * width
                axes.bar(place, value, 0.92 * width, color=colours[label], alpha=0.85, label=label if not group else "")
                error = [[max(value - low, 0)], [max(high - value, 0)]]
                axes.errorbar(place, value, yerr=error, color="black", capsize=2.5, linewidth=0.9)
                axes.annotate(
                    f"{value:.1f}", (place, high), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7.5
                )
                highest = max(highest, high)
        counts = {name: next(iter(results.values()))["samples_per_prompt"] for name, results in found.items()}
        axes.set_xticks(range(len(found)), [f"{name}\nAvg@{counts[name]}" for name in found])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, min(1.12 * highest, 112))
        axes.set_ylabel("right answers (%)")
        figure.legend(handles=_patches(colours), loc="outside upper left", ncols=min(6, len(colours)), frameon=False)
        figure.supxlabel(
            "Whiskers: 95% CI over problems, without the spread of training seeds.",
            fontsize=7.5, color=NEUTRAL, x=0.01, ha="left",
        )  # fmt: skip

    return save_figure(fill, output, (max(4.6, 1.0 + len(found) * (0.5 + 0.5 * len(colours))), 3.2))


def _colours(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    labels = dict.fromkeys(label for results in found.values() for label in results)
    return {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}


def _patches(colours: Mapping[str, str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=colour, alpha=0.85, label=label) for label, colour in colours.items()]
