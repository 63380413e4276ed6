"""The figure and the summary of evaluations: models side by side, on one or several problem sets.

Reads the ``table.json`` of :func:`megatron_oisd.rl.evaluate.write_table`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_oisd.analysis.plotting import COLOURS, save_figure
from megatron_oisd.errors import OISDError


def read_tables(tables: Mapping[str, str | Path]) -> dict[str, dict[str, Any]]:
    """Return the summaries by problem set and label.

    Raises:
        OISDError: a file is missing or no table.
    """
    found = {}
    for name, path in tables.items():
        try:
            found[name] = dict(json.loads(Path(path).read_text(encoding="utf-8"))["results"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OISDError(f"{path}: not a table of tools/evaluate.py ({error}); evaluate again") from error
    return found


def write_summary(tables: Mapping[str, str | Path], directory: str | Path) -> str:
    """Write ``summary.md`` and ``summary.json``: Avg@K of each label on each set, and their mean over the sets.

    The mean stands only where a label was evaluated on all sets; sets count the same, as in the paper's tables.

    Returns:
        The text of ``summary.md``.
    """
    found = read_tables(tables)
    labels = list(dict.fromkeys(label for results in found.values() for label in results))
    header = ["model", *found, "mean"]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    document: dict[str, dict[str, float | None]] = {}
    for label in labels:
        values = {name: results[label]["avg_at_k"] if label in results else None for name, results in found.items()}
        known = [value for value in values.values() if value is not None]
        document[label] = values | {"mean": sum(known) / len(known) if len(known) == len(values) else None}
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in document[label].values()]
        lines.append("| " + " | ".join([label.replace("|", "\\|"), *cells]) + " |")
    text = "\n".join(lines) + "\n\nAvg@K in per cent; K and the intervals are in each set's table.\n"
    directory = Path(directory)
    (directory / "summary.md").write_text(text, encoding="utf-8")
    (directory / "summary.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return text


def draw_evaluations(tables: Mapping[str, str | Path], output: str | Path) -> list[Path]:
    """Draw Avg@K with its 95% interval and Pass@k over k, a row of two axes for each problem set. Returns PNG and SVG.

    Raises:
        OISDError: matplotlib or a table is missing.
    """
    found = read_tables(tables)

    def fill(figure: Any) -> None:
        axes = figure.subplots(len(found), 2, squeeze=False, width_ratios=[1, 1.6])
        labels = list(dict.fromkeys(label for results in found.values() for label in results))
        colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}
        for (bars, curves), (name, results) in zip(axes, found.items(), strict=True):
            for number, (label, summary) in enumerate(results.items()):
                value = 100 * summary["avg_at_k"]
                low, high = (100 * bound for bound in summary["avg_at_k_interval"])
                bars.errorbar(
                    value, -number, xerr=[[max(value - low, 0)], [max(high - value, 0)]], fmt="o", markersize=4,
                    capsize=2.5, color=colours[label],
                )  # fmt: skip
                passes = {int(k): 100 * v for k, v in summary["pass_at_k"].items()}
                curves.plot(list(passes), list(passes.values()), "o-", markersize=3, color=colours[label], label=label)
            count = "/".join(str(k) for k in sorted({summary["samples_per_prompt"] for summary in results.values()}))
            problems = next(iter(results.values()))["num_problems"]
            bars.set_title(f"{name}: Avg@{count}")
            bars.set_yticks([-number for number in range(len(results))], list(results))
            bars.set_ylim(-len(results) + 0.4, 0.6)
            bars.set_xlabel(f"per cent (95% CI over {problems} problems)")
            curves.set_title("Pass@k (unbiased)")
            curves.set_xscale("log", base=2)
            curves.xaxis.set_major_formatter("{x:.0f}")
            curves.set_xlabel("k")
            curves.set_ylabel("per cent")
        if len(labels) > 1:
            axes[0, 1].legend(frameon=False)

    return save_figure(fill, output, (7.2, 2.4 * len(found)))
