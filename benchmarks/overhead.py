"""What OISD adds to an update: ``python -m benchmarks.overhead``.

Rows go to ``benchmarks/results/overhead-cpu.jsonl``, on a GPU to ``overhead-cuda.jsonl``, with Qwen3-4B's shape.
GRPO alone and with each loss take turns on one model; the ratio to GRPO stands beside the arithmetic lower bound, the
matrix products that logit alignment needs over those of the update. Under pipeline parallelism the bound is that of all
stages together: what is added on one stage can cost more (``docs/pipeline_sim.md``).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.updates import Shape, Updates
from megatron_oisd.config import OISDConfig
from tests.helpers.ranks import run_ranks

_COLUMNS = {
    "layout": "layout", "update": "update", "ms p20": "p20_ms", "p50": "p50_ms", "p80": "p80_ms", "/ GRPO": "ratio",
    "bound": "bound",
}  # fmt: skip


def _variants(layer: int) -> dict[str, OISDConfig | None]:
    both = OISDConfig(layers=(layer,))
    return {
        "GRPO": None,
        "OISD": both,
        "OISD, head gradient off": replace(both, head_gradient=False),
        "logit alignment": replace(both, lambda_attn=0.0),
        "attention alignment": replace(both, lambda_think=0.0),
    }


def _measure(shape: Shape, tp: int, pp: int, repeats: int) -> list[dict[str, Any]]:
    """Called on every rank."""
    variants = _variants(max(shape.layers // 6, 1))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with Updates(shape, tp=tp, pp=pp) as updates:
        for number in range(repeats + 1):
            for name, config in variants.items():
                if config is not None:
                    updates.attach(config)
                seconds = updates.timed(oisd=config is not None)
                if number:  # the first round warms up
                    taken[name].append(seconds)
    rows, base = [], harness.Timing.of(taken["GRPO"]).p50
    for name, config in variants.items():
        timing = harness.Timing.of(taken[name])
        added = 0.0
        if config is not None and config.lambda_think > 0:
            added = shape.lens_flops(1, head_gradient=config.head_gradient)
        rows.append(
            {
                "layout": f"TP {tp}, PP {pp}", "update": name, "p20_ms": 1000 * timing.p20, "p50_ms": 1000 * timing.p50,
                "p80_ms": 1000 * timing.p80, "ratio": timing.p50 / base, "bound": 1 + added / shape.flops(),
                **{k: str(v) if k == "dtype" else v for k, v in asdict(shape).items()},
            }
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=36, help="layers of the model on a GPU; Qwen3-4B has 36")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the command")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    if options.device == "cuda":
        rows = _measure(Shape.qwen3_4b(options.layers), 1, 1, options.repeats)
    else:
        shape = Shape.tiny() if options.tiny else Shape()
        for tp, pp in tqdm([(1, 1), (1, 2), (2, 1)], desc="layouts", unit="layout"):
            rows += run_ranks(tp * pp, _measure, shape, tp, pp, options.repeats, timeout_s=1800.0)[0]
    harness.write_rows(options.out / f"overhead-{options.device}.jsonl", harness.environment(options.device), rows)
    print(harness.markdown(rows, _COLUMNS))


if __name__ == "__main__":
    main()
