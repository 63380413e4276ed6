"""Step time of a pipelined GRPO update with the logit lens in it, simulated: ``python -m benchmarks.pipeline_sim``.

Three updates are compared under 1F1B and interleaved 1F1B, in Megatron-Core's order of forwards and backwards: GRPO
alone, the lens on the student's stage (this package) and the lens on the last stage. What each stage does, sends and
reduces is in :mod:`.pipeline_costs`, the order of events in :mod:`.pipeline_schedule`, the splits of layers in
:mod:`.pipeline_splits`.

Sends of 1F1B hold the sender ("blocking"), those of the interleaved schedule do not ("overlapped"). Teachers go through
their channel one by one. "at-backward" starts a transfer when the student's backward reaches its tap, since that is
where the package posts the receive; "early" starts it when the teacher exists. Replica refresh and return of the head
gradient are added to the step in full, hidden behind nothing.

*Not modelled.* Rollouts, optimizer, data-parallel reduction. Everything bound by memory: norms, softmax, the passes
over logits, kernel launches, the allocator; making a top-k teacher. The teachers' headers (they go from host to host)
and the small collectives of each chunk of the lens. A message that waits for its receiver (except the teacher's), two
messages on one link, a send that takes multiprocessors from compute. Efficiency that differs between shapes: every
product runs at the one rate, and the layers' own tensor-parallel collectives are in that rate. Sequences of different
lengths. Memory, but for the teachers'. Numbers are ratios to think with, no measurement.

Stages and ranks are counted from 0, layers from 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.pipeline_costs import MODELS, VARIANTS, Case, Settings
from benchmarks.pipeline_splits import best_split, megatron_split, virtual_size

# --------------------------------------------------------------------------------------------- rows and figure

REMEDIES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "receive early": {"receive": "early"},
    "every rank sends all rows": {"shard_teacher": False},
    "logits teacher": {"teacher_payload": "logits"},
    "no head gradient": {"head_gradient": False},
    "half of the tokens": {"lens_tokens": 0.5},
    "top-256 teacher": {"teacher_payload": "topk", "teacher_topk": 256},
    "early, no head gradient, half": {"receive": "early", "head_gradient": False, "lens_tokens": 0.5},
}
_COLUMNS = {
    "model": "model", "PP": "pp", "chunks": "chunks", "layer": "layer", "on rank": "student_rank", "GRPO s": "step_s",
    "bubble": "bubble", "student stage": "student stage", "last stage": "last stage", "GRPO*": "plain best",
    "student stage*": "student stage best", "last stage*": "last stage best", "work added": "added_work",
    "exposed s": "transfer_exposed_s", "wait s": "teacher_wait_s", "teachers": "teachers", "buffers": "buffers",
    "MB": "buffers_mb",
}  # fmt: skip


def measure(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Rows: every variant with Megatron's split and with the best found, then what can be changed about the lens."""
    cases, rows = list(cases), []
    # What was found for one case may be better for another on the same pipeline than what was found for that one.
    pool: dict[Any, dict[tuple[int, ...], None]] = {}
    for case in cases:
        for variant in VARIANTS:
            # The student's layer does not matter to plain: one search for all layers.
            same = replace(case, layer=1) if variant == "plain" else case
            pool.setdefault(replace(case, layer=1), {})[best_split(same, variant)] = None
    for case in cases:
        split = tuple(megatron_split(case.model.layers, case.ranks, case.chunks))
        base = case.seconds(split, "plain")

        def add(row: dict[str, Any], kind: str, remedy: str = "", *, base: float = base) -> None:
            rows.append({"kind": kind, "remedy": remedy, "ratio": round(row["step_s"] / base, 5)} | row)

        for variant in VARIANTS:
            add(case.row(split, variant), "megatron split")
            candidates = [(case.seconds(other, variant), other) for other in pool[replace(case, layer=1)]]
            add(case.row(min(candidates)[1], variant), "best split")
        for name, changes in REMEDIES.items():
            row = replace(case, settings=replace(case.settings, **changes)).row(split, "student stage")
            del row["load_ms"]
            add(row, "remedy", name)
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "pp", "chunks", "layer", "recompute"))


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each case: ratios to plain GRPO with Megatron's split."""
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault(_key(row), {})
        if row["kind"] == "remedy":
            line[row["remedy"]] = row["ratio"]
        elif row["kind"] == "best split":
            line[f"{row['variant']} best"] = row["ratio"]
        else:
            line[row["variant"]] = row["ratio"]
            if row["variant"] == "plain":
                line |= {key: value for key, value in row.items() if key not in ("kind", "remedy", "variant")}
            if row["variant"] == "student stage":
                names = ("added_work", "teacher_wait_s", "transfer_exposed_s", "teachers", "buffers", "buffers_mb")
                line |= {name: row[name] for name in names}
    return list(table.values())


_BLUE, _ORANGE, _GREEN, _GREY = "#9DB8D9", "#E69F00", "#009E73", "#777777"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The figure: each rank's work in one microbatch, for the longest pipeline, and the step of every case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 8.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.linewidth": 0.7}
    rows = [row for row in rows if row["recompute"] == rows[0]["recompute"]]
    cases = summary(rows)
    rows = [row for row in rows if row["kind"] != "remedy"]
    with pyplot.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(10.2, 1.6 + max(4.6, 0.3 * len(cases))), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35))
        _draw_loads(left, rows)
        _draw_ratios(right.subplots(), cases)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        pyplot.close(figure)


def _draw_loads(figure: Any, rows: list[dict[str, Any]]) -> None:
    chosen = max(rows, key=lambda row: (row["model"] == rows[0]["model"], -row["chunks"], row["pp"]))
    mine = {(row["variant"], row["kind"]): row for row in reversed(rows) if _key(row) == _key(chosen)}
    panels = [
        ("GRPO", mine["plain", "megatron split"]),
        ("lens on the student's stage", mine["student stage", "megatron split"]),
        ("lens on the last stage", mine["last stage", "megatron split"]),
        ("student's stage, best split", mine["student stage", "best split"]),
    ]
    top = max(max(row["load_ms"]) for _, row in panels)
    figure.suptitle(
        "Work of each rank in one microbatch (ms)\n"
        f"{chosen['model'].upper()}, PP {chosen['pp']}, {_schedule(chosen)}, student layer {chosen['layer']}",
        fontsize=9.5, x=0.02, ha="left",
    )  # fmt: skip
    for axes, (title, row) in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
        ranks = range(row["pp"])
        output = [row["output_ms"] * (rank == row["pp"] - 1) for rank in ranks]
        lens = [row["lens_ms"] * (rank == row["lens_rank"]) for rank in ranks]
        layers = [load - a - b for load, a, b in zip(row["load_ms"], output, lens, strict=True)]
        axes.bar(ranks, layers, color=_BLUE, label="layers")
        axes.bar(ranks, output, bottom=layers, color=_ORANGE, label="output layer")
        axes.bar(ranks, lens, bottom=[a + b for a, b in zip(layers, output, strict=True)], color=_GREEN, label="lens")
        axes.axhline(max(row["load_ms"]), color=_GREY, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_ylim(0, 1.28 * top)
        axes.set_xlim(-0.6, row["pp"] - 0.4)
        axes.text(-0.5, 1.26 * top, f"{title}: step {row['step_s']:.2f} s", va="top")
        axes.set_xticks(list(ranks)[:: 1 if row["pp"] <= 16 else 4])
    axes.set_xlabel("pipeline rank")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def _schedule(row: dict[str, Any]) -> str:
    return "1F1B" if row["chunks"] == 1 else f"{row['chunks']} chunks"


def _draw_ratios(axes: Any, cases: list[dict[str, Any]]) -> None:
    axes.axvline(1.0, color="black", linewidth=0.7)
    marks = (
        ("student stage", "lens on the student's stage", "o", _GREEN, True),
        ("student stage best", "the same, best split", "o", _GREEN, False),
        ("last stage", "lens on the last stage", "s", _ORANGE, True),
        ("last stage best", "the same, best split", "s", _ORANGE, False),
        ("plain best", "GRPO, best split", "|", "black", False),
        ("logits teacher", "logits teacher (last rank)", "^", _GREEN, True),
    )
    labels = []
    for line, case in enumerate(cases):
        labels.append(f"{case['model'].upper()}  PP {case['pp']}  {_schedule(case)}  layer {case['layer']}")
        axes.axhline(line, color="#E5E5E5", linewidth=0.7, zorder=0)
    for name, label, mark, colour, filled in marks:
        face = colour if filled or mark == "|" else "white"
        size, edge = (70, {}) if mark == "|" else (28, {"edgecolors": colour})
        shift = {"o": -0.14, "^": -0.14, "s": 0.14, "|": 0.0}[mark]
        shown = [line for line, case in enumerate(cases) if mark != "^" or case["student_rank"] == case["pp"] - 1]
        axes.scatter(
            [cases[line][name] for line in shown], [line + shift for line in shown], marker=mark, s=size,
            facecolors=face, linewidths=1.1, label=label, zorder=3 + (mark == "|"), **edge,
        )  # fmt: skip
    axes.set_yticks(range(len(cases)), labels)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("step / step of GRPO with Megatron's split")
    axes.set_title("Step time", loc="left")
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False)


# ------------------------------------------------------------------------------------------------ command line


def _number(text: str) -> float:
    value = float(text)
    if value <= 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text}: expected a layer counted from 1, or a share of the depth below 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline_sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--pp", type=int, action="append", help="pipeline size; default: 8 and 16")
    parser.add_argument("--chunks", type=int, action="append", help="chunks of a rank: 1 is 1F1B, 0 the fewest above 1 "
                        "that divide the layers; default: 1 and 0")  # fmt: skip
    parser.add_argument("--layer", type=_number, action="append", help="student layer, or share of the depth below 1; "
                        "default: 6 and 0.9")  # fmt: skip
    parser.add_argument("--recompute", choices=("none", "full"), action="append", help="default: both")
    for item in fields(Settings):
        flag, text = "--" + item.name.replace("_", "-"), f"{item.metadata['help']} (default: {item.default})"
        if isinstance(item.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=item.default, help=text)
        else:
            parser.add_argument(flag, type=type(item.default), default=item.default, help=text)
    parser.add_argument("--out", type=Path, help="folder of the rows (default: benchmarks/results)")
    parser.add_argument("--image", type=Path, help="the figure (default: docs/images/pipeline_sim.png)")
    return parser


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the flags ask for."""
    settings = Settings(**{item.name: getattr(options, item.name) for item in fields(Settings)})
    made = []
    for recompute in options.recompute or ("none", "full"):
        for name in options.model or MODELS:
            model = MODELS[name]
            for ranks in options.pp or (8, 16):
                for asked in options.chunks or (1, 0):
                    chunks = asked or virtual_size(model.layers, ranks)
                    for layer in options.layer or (6, 0.9):
                        number = int(layer) if layer >= 1 else max(1, round(layer * model.layers))
                        made.append(Case(model, ranks, chunks, number, recompute == "full", settings))
    return made


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    chosen = cases(options)
    rows = measure(chosen)
    record = harness.environment("cpu") | {"settings": asdict(chosen[0].settings)}
    harness.write_rows((options.out or harness.RESULTS) / "pipeline-sim.jsonl", record, rows)
    lines = summary(rows)
    for recompute in dict.fromkeys(line["recompute"] for line in lines):
        print(f"\nrecompute {recompute}; ratios to GRPO with Megatron's split; *: best split found\n")
        mine = [line for line in lines if line["recompute"] == recompute]
        print(harness.markdown(_rounded(mine), _COLUMNS))
        names = {"model": "model", "PP": "pp", "chunks": "chunks", "layer": "layer", "on rank": "student_rank"}
        print("\n" + harness.markdown(_rounded(mine), names | {name: name for name in REMEDIES}))
    draw(rows, options.image or Path(__file__).resolve().parents[1] / "docs" / "images" / "pipeline_sim.png")


def _rounded(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios with three decimals, so that 1.02 and 1.024 can be told apart."""
    ratios = {*VARIANTS, *(f"{name} best" for name in VARIANTS), *REMEDIES}
    return [{key: f"{value:.3f}" if key in ratios else value for key, value in line.items()} for line in lines]


if __name__ == "__main__":
    main()
