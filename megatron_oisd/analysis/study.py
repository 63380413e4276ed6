"""What the runs of a study say: means and intervals over seeds, differences paired by seed, compute-matched ones.

Rows are one finished run at one number of steps: ``variant``, ``lr``, ``seed``, ``steps``, ``avg_at_8``,
``pass_at_8``, ``reward_last_10``, ``rewards`` and ``step_flops``, the operations of a step. Seeds are the unit:
intervals are Student's t over them, and a difference is that of runs with the same seed. With few seeds an interval
is wide, and says so. Times are rows of their own, ``variant``, ``round`` and ``step_s``, since runs may share their
machine: those of one round were measured in turns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_oisd.analysis.plotting import COLOURS, NEUTRAL, save_figure
from megatron_oisd.errors import OISDError

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    low: float
    """Of the 95% interval; NaN with a single seed, as is ``high``."""
    high: float
    count: int
    p_value: float = math.nan
    """Of a paired t-test against no difference."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Student's t interval, and the t-test against a mean of 0."""
        stats = _scipy_stats()
        data = np.asarray(values, dtype=np.float64)
        count, mean = len(data), float(data.mean())
        if count < 2:
            return cls(mean=mean, low=math.nan, high=math.nan, count=count)
        error = float(data.std(ddof=1)) / math.sqrt(count)
        half = float(stats.t.ppf(0.975, count - 1)) * error
        p_value = float(stats.ttest_1samp(data, 0.0).pvalue) if error else math.nan
        return cls(mean=mean, low=mean - half, high=mean + half, count=count, p_value=p_value)


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A variant against the baseline trained as long as one resource lasts that the variant used up."""

    cost: float
    """Of a variant's step over the baseline's."""
    steps: int | None
    """The first of the baseline's evaluated numbers of steps that takes as much; None: none does."""
    difference: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One variant, and what it does beyond the baseline; None for the baseline itself and without common seeds."""

    variant: str
    result: Estimate
    difference: Estimate | None
    """To the baseline at the same number of steps."""
    time: Matched | None
    operations: Matched | None


def compare(
    rows: Sequence[Row], *, baseline: str, steps: int, times: Sequence[Row] = (), metric: str = "avg_at_8"
) -> list[Comparison]:
    """Compare every variant with the baseline at equal steps, equal wall time and equal operations.

    Args:
        rows: see the module; of one learning rate.
        baseline: a variant's name.
        steps: the number of steps at which variants are compared.
        times: see the module; a variant without one is not compared at equal time.
        metric: a column.

    Raises:
        OISDError: the baseline has no row, or scipy is missing.
    """
    base = _by_seed(rows, baseline, steps)
    if not base:
        raise OISDError(f"the study has no finished run of {baseline!r} at {steps} steps: run it first")
    found = []
    for variant in dict.fromkeys([baseline, *(row["variant"] for row in rows)]):
        own = _by_seed(rows, variant, steps)
        if not own:
            continue
        seeds = sorted(own.keys() & base.keys())
        difference = time = operations = None
        if variant != baseline and seeds:
            difference = Estimate.of([own[seed][metric] - base[seed][metric] for seed in seeds])
            flops = [float(np.median([row["step_flops"] for row in runs.values()])) for runs in (own, base)]
            operations = _match(rows, own, flops[0] / flops[1], baseline=baseline, steps=steps, metric=metric)
            cost = _relative_time(times, variant, baseline)
            if cost is not None:
                time = _match(rows, own, cost, baseline=baseline, steps=steps, metric=metric)
        found.append(
            Comparison(
                variant=variant, result=Estimate.of([row[metric] for row in own.values()]), difference=difference,
                time=time, operations=operations,
            )
        )  # fmt: skip
    return found


def _match(
    rows: Sequence[Row], own: Mapping[int, Row], cost: float, *, baseline: str, steps: int, metric: str
) -> Matched:
    needed = _first_at_least(rows, baseline, steps * cost)
    longer = _by_seed(rows, baseline, needed)
    both = sorted(own.keys() & longer.keys())
    difference = Estimate.of([own[seed][metric] - longer[seed][metric] for seed in both]) if both else None
    return Matched(cost=cost, steps=needed, difference=difference)


def _relative_time(times: Sequence[Row], variant: str, baseline: str) -> float | None:
    """Median over rounds of the variant's step over the baseline's of the same round; None: not measured."""
    own, base = (
        {row["round"]: row["step_s"] for row in times if row["variant"] == name} for name in (variant, baseline)
    )
    ratios = [own[number] / base[number] for number in own.keys() & base.keys()]
    return float(np.median(ratios)) if ratios else None


def reward_differences(rows: Sequence[Row], *, baseline: str, steps: int, window: int) -> dict[str, Estimate]:
    """Each variant's mean training reward over the first ``window`` steps less the baseline's, paired by seed.

    Held-out scores at the end do not see how fast a variant got there.
    """
    base = _by_seed(rows, baseline, steps)
    found = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = _by_seed(rows, variant, steps)
        seeds = sorted(own.keys() & base.keys())
        if variant != baseline and seeds:
            means = [
                float(np.mean(own[seed]["rewards"][:window]) - np.mean(base[seed]["rewards"][:window]))
                for seed in seeds
            ]
            found[variant] = Estimate.of(means)
    return found


def write_report(
    rows: Sequence[Row], directory: str | Path, *, baseline: str, steps: int, times: Sequence[Row] = ()
) -> str:
    """Write ``study.md``, ``study.json`` and for each learning rate a figure, ``study-LR.png`` and ``.svg``.

    Returns:
        The text of ``study.md``.
    """
    directory = Path(directory)
    texts, document = [], {}
    for lr in dict.fromkeys(row["lr"] for row in rows):
        own = [row for row in rows if row["lr"] == lr]
        comparisons = compare(own, baseline=baseline, steps=steps, times=times)
        texts.append(f"### Learning rate {lr}\n\n{_tables(own, comparisons, baseline=baseline, steps=steps)}")
        document[lr] = [asdict(row) for row in comparisons]
        draw(own, comparisons, directory / f"study-{lr}.png", baseline=baseline, steps=steps)
    text = "\n".join(texts)
    (directory / "study.md").write_text(text, encoding="utf-8")
    (directory / "study.json").write_text(json.dumps(_finite(document), indent=1) + "\n", encoding="utf-8")
    return text


def _tables(rows: Sequence[Row], comparisons: Sequence[Comparison], *, baseline: str, steps: int) -> str:
    """Held-out scores and training rewards, as Markdown."""
    lines = [
        f"Avg@8 in per cent at {steps} steps, 95% intervals over seeds (Student's t), differences paired by seed.",
        "",
        f"| variant | seeds | Avg@8 | - {baseline} | p | operations of a step | - {baseline} at equal operations | p "
        f"| its steps | time of a step | - {baseline} at equal time | p | its steps |",
        "| --- | " + " | ".join(["---:"] * 12) + " |",
    ]
    for row in comparisons:
        cells = [
            row.variant, str(row.result.count), _cell(row.result), _cell(row.difference, signed=True),
            _p(row.difference), *_matched_cells(row, row.operations), *_matched_cells(row, row.time),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    windows = sorted({max(1, steps // 6), max(1, steps // 3), steps})
    differences = [reward_differences(rows, baseline=baseline, steps=steps, window=window) for window in windows]
    lines += [
        "",
        f"Training reward less {baseline}'s, in points, mean over the first steps.",
        "",
        "| variant | " + " | ".join(f"steps 1 to {window} | p" for window in windows) + " |",
        "| --- | " + " | ".join(["---:"] * 2 * len(windows)) + " |",
    ]
    for variant in differences[0]:
        cells = [cell for found in differences for cell in (_cell(found[variant], signed=True), _p(found[variant]))]
        lines.append("| " + " | ".join([variant, *cells]) + " |")
    return "\n".join(lines) + "\n"


def draw(
    rows: Sequence[Row], comparisons: Sequence[Comparison], output: Path, *, baseline: str, steps: int
) -> list[Path]:
    """Left training rewards of the first variants with the most seeds, right each variant's held-out difference."""
    most = max(row.result.count for row in comparisons)
    main = [row.variant for row in comparisons if row.result.count == most][:5]
    base = _by_seed(rows, baseline, steps)

    def curve(axes: Any, colour: str, label: str, curves: Sequence[Any]) -> None:
        values = np.array(curves)
        x, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
        axes.plot(x, mean, color=colour, label=label, linewidth=1.2)
        if len(values) > 1:
            error = values.std(0, ddof=1) / math.sqrt(len(values))
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, lw=0)

    def fill(figure: Any) -> None:
        panels = figure.subplot_mosaic([["reward", "score"], ["lag", "score"]], width_ratios=[1.1, 1])
        reward, lag, right = panels["reward"], panels["lag"], panels["score"]
        for colour, variant in zip(COLOURS, main, strict=False):
            own = _by_seed(rows, variant, steps)
            curve(reward, colour, variant, [_smooth(row["rewards"]) for row in own.values()])
            seeds = own.keys() & base.keys()
            if variant != baseline and seeds:
                pairs = [np.subtract(own[seed]["rewards"], base[seed]["rewards"]) for seed in sorted(seeds)]
                curve(lag, colour, variant, [100 * _smooth(pair, 10) for pair in pairs])
        reward.set_title("Training reward")
        reward.set_ylabel("5-step mean, ± s.e.")
        reward.legend(frameon=False, loc="lower right", fontsize=7.5)
        lag.axhline(0.0, color=NEUTRAL, linewidth=0.8)
        lag.set_title(f"Training reward - {baseline}'s")
        lag.set_ylabel("points, 10-step mean, ± s.e.")
        lag.set_xlabel("step")
        others = [row for row in comparisons if row.difference is not None]
        for number, row in enumerate(others):
            shown = (
                ("equal steps", row.difference, 0.22, "o", COLOURS[0]),
                ("equal operations", row.operations.difference if row.operations else None, 0.0, "s", COLOURS[1]),
                ("equal time", row.time.difference if row.time else None, -0.22, "^", COLOURS[2]),
            )
            for label, estimate, shift, marker, colour in shown:
                if estimate is None:
                    continue
                half = 0.0 if math.isnan(estimate.low) else 100 * (estimate.high - estimate.mean)
                right.errorbar(
                    100 * estimate.mean, -number + shift, xerr=half, fmt=marker, markersize=3.5, capsize=2,
                    color=colour, label=label if number == 0 else None,
                )  # fmt: skip
        right.axvline(0.0, color=NEUTRAL, linewidth=0.8)
        right.set_yticks(
            [-number for number in range(len(others))], [f"{r.variant} ({r.result.count})" for r in others]
        )
        right.set_title(f"Held-out Avg@8 - {baseline}'s")
        right.set_xlabel("points (95% CI over seeds)")
        if others:
            handles, names = right.get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower right", ncols=3, frameon=False)

    return save_figure(fill, output, (7.6, max(4.6, 1.0 + 0.3 * len(comparisons))))


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise OISDError("the study's statistics need scipy: pip install 'megatron_oisd[study]'") from error
    return stats


def _by_seed(rows: Sequence[Row], variant: str, steps: int | None) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["variant"] == variant and row["steps"] == steps}


def _first_at_least(rows: Sequence[Row], variant: str, steps: float) -> int | None:
    evaluated = sorted({row["steps"] for row in rows if row["variant"] == variant})
    return next((number for number in evaluated if number >= steps - 1e-9), None)


def _smooth(values: Sequence[float], width: int = 5) -> Any:
    """Trailing mean, shorter at the start."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    sign = "+" if signed else ""
    mean = f"{100 * estimate.mean:{sign}.1f}"
    if math.isnan(estimate.low):
        return mean
    return f"{mean} ({100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f})"


def _matched_cells(row: Comparison, matched: Matched | None) -> list[str]:
    if matched is None:
        return ["1" if row.difference is None else "-", "-", "-", "-"]
    steps = "-" if matched.steps is None else str(matched.steps)
    return [f"{matched.cost:.2f}", _cell(matched.difference, signed=True), _p(matched.difference), steps]


def _p(estimate: Estimate | None) -> str:
    return "-" if estimate is None or math.isnan(estimate.p_value) else f"{estimate.p_value:.3f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
