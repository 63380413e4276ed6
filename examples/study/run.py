"""The study in one command: GRPO, each OISD loss and both, several seeds, on the quickstart's task; resumable.

    python examples/study/run.py --output runs/study            # every run that is not finished yet
    python examples/study/run.py --output runs/study --report   # table and figures of what is finished

Each run is the ordinary commands: train (one rank, so that several fit a machine), convert, evaluate on held-out
problems. Runs with the same seed see the same prompts and start from the same model, so variants are compared pair by
pair. Finished runs are rows of ``rows.jsonl``; a run that was killed goes on from its own checkpoint.

GRPO alone trains longer than the others and is evaluated on the way: OISD's steps cost more, and the comparison at
equal wall time and at equal operations needs GRPO's results at correspondingly more steps. What a step takes is
measured before the runs, one variant at a time with nothing beside it, the variants in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TOOLS, QUICKSTART, DIAGNOSE = ROOT / "tools", ROOT / "examples" / "quickstart", Path(__file__).with_name("diagnose.py")
RECIPE = shlex.split(
    "--oisd-layers 2 --prompts-per-step 32 --mini-batch-prompts 16 --samples-per-prompt 8 --max-prompt-tokens 128 "
    "--max-response-tokens 40 --max-tokens-per-microbatch 4096 --adam-beta2 0.95 --log-samples 0"
)

FAST, SLOW = "3e-4", "1e-4"
"""Learning rates: with the first GRPO has nearly arrived after 60 steps, with the second it is on its way."""

COUNTING = Lock()
"""One thread at a time: two runs of a variant would count into the same folder."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One arm of the study."""

    name: str
    flags: str
    lr: str = FAST
    seeds: int = 5
    longer: bool = False
    """Train and evaluate beyond the number of steps at which variants are compared."""

    @property
    def arguments(self) -> list[str]:
        """Of the training command."""
        return [*RECIPE, "--lr", self.lr, *self.flags.split()]

    @property
    def directory(self) -> str:
        """Of its runs."""
        name = self.name if self.lr == FAST else f"{self.name} lr {self.lr}"
        return name.replace(" ", "_").replace(",", "")


LOUD = "--oisd-lambda-think 0 --oisd-lambda-attn 5"
VARIANTS = (
    Variant(name="GRPO", flags="--oisd-lambda-think 0 --oisd-lambda-attn 0", longer=True),
    Variant(name="logit only", flags="--oisd-lambda-attn 0"),
    Variant(name="attention only", flags="--oisd-lambda-think 0"),
    Variant(name="OISD", flags=""),
    Variant(name="OISD, absolute weights", flags="--oisd-advantage-weighting absolute", seeds=3),
    Variant(name="OISD, unweighted", flags="--oisd-advantage-weighting none", seeds=3),
    Variant(name="OISD, head gradient off", flags="--no-oisd-head-gradient", seeds=3),
    Variant(name="OISD, layer 1", flags="--oisd-layers 1", seeds=3),
    Variant(name="OISD, layer 3", flags="--oisd-layers 3", seeds=3),
    Variant(name="OISD, tau 2", flags="--oisd-temperature 2", seeds=3),
    Variant(name="OISD, c inf", flags="--oisd-advantage-clip inf", seeds=3),
    Variant(name="OISD, 8 keys", flags="--oisd-attn-window 4 --oisd-attn-global-keys 4", seeds=3),
    Variant(name="OISD, lambda 0.1 and 0.01", flags="--oisd-lambda-think 0.1 --oisd-lambda-attn 0.01", seeds=3),
    Variant(name="attention only, lambda 5", flags=LOUD, seeds=3),
    Variant(name="GRPO", flags="--oisd-lambda-think 0 --oisd-lambda-attn 0", lr=SLOW, longer=True),
    Variant(name="logit only", flags="--oisd-lambda-attn 0", lr=SLOW),
    Variant(name="attention only", flags="--oisd-lambda-think 0", lr=SLOW),
    Variant(name="OISD", flags="", lr=SLOW),
    Variant(name="attention only, lambda 5", flags=LOUD, lr=SLOW),
    Variant(name="OISD, head gradient off", flags="--no-oisd-head-gradient", lr=SLOW),
    Variant(name="OISD, lambda 0.1 and 0.01", flags="--oisd-lambda-think 0.1 --oisd-lambda-attn 0.01", lr=SLOW),
)


class Rows:
    """The finished runs, one JSON line each; several threads append."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # A line without an end is what a killed command left.
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]

    def has(self, variant: Variant, seed: int) -> bool:
        """Whether the run is finished."""
        return any((row["variant"], row["lr"], row["seed"]) == (variant.name, variant.lr, seed) for row in self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one run, all or none."""
        with self._lock:
            self.rows += rows
            work = self._path.with_suffix(".incomplete")
            work.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
            work.replace(self._path)


def call(*command: str | Path, log: Path) -> None:
    """Run one command with its output in a file; its last lines are the error where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with log.open("ab") as file:
        code = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        raise OISDError(f"{Path(command[0]).name} ended with exit code {code}, see {log}: {' / '.join(tail)}")


def prepare(output: Path) -> None:
    """Problems and the model that all runs start from, once."""
    log = output / "prepare.log"
    if (output / "mcore" / "latest_checkpointed_iteration.txt").is_file():
        return
    call(QUICKSTART / "arithmetic.py", "--out", output / "data", "--seed", "1", log=log)
    if not (output / "model" / "config.json").is_file():
        call(QUICKSTART / "make_model.py", "--out", output / "model", "--seed", "1", log=log)
    call(TOOLS / "convert_hf_to_mcore.py", "--hf", output / "model", "--output", output / "mcore", log=log)


def evaluate(output: Path, model: Path, directory: Path, problems: int, log: Path) -> dict[str, float]:
    """Avg@8 and Pass@8 on held-out problems."""
    call(
        TOOLS / "evaluate.py", "--model", model, "--data", output / "data" / "heldout.jsonl", "--samples", "8",
        "--limit", str(problems), "--max-new-tokens", "40", "--seed", "1", "--output", directory, "--label", "run",
        "--batch", "512", log=log,
    )  # fmt: skip
    summary = json.loads((directory / "table.json").read_text())["results"]["run"]
    return {"avg_at_8": summary["avg_at_k"], "pass_at_8": summary["pass_at_k"]["8"]}


def operations(output: Path, variant: Variant) -> int:
    """Of a step of the variant, its first: counted once, whatever the seed."""
    name = variant.directory
    rows = output / "costs" / f"{name}.jsonl"
    with COUNTING:
        if not rows.is_file():
            rows.parent.mkdir(parents=True, exist_ok=True)
            call(
                DIAGNOSE, "--count", "--out", rows, "--", "--load", output / "mcore", "--data",
                output / "data" / "train.jsonl", "--output", output / "costs" / name, "--num-steps", "1", "--seed",
                "1", *variant.arguments, log=output / "costs" / f"{name}.log",
            )  # fmt: skip
    return int(json.loads(rows.read_text(encoding="utf-8"))["step"])


def step_times(arguments: argparse.Namespace, variants: list[Variant], rows: Rows) -> None:
    """Wall time of a step of each variant, in rounds: one variant after the other, nothing beside it."""
    output: Path = arguments.output
    done = {(row["variant"], row["round"]) for row in rows.rows}
    # A learning rate costs no time: each set of flags is timed once.
    names = {variant.name: variant for variant in variants}
    todo = [
        (number, variant)
        for number in range(arguments.rounds)
        for name, variant in names.items()
        if (name, number) not in done
    ]
    for number, variant in tqdm(todo, desc="step times", unit="run", disable=not todo):
        directory = output / "times" / f"{variant.directory}-{number}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        call(
            TOOLS / "train_rl.py", "--load", output / "mcore", "--data", output / "data" / "train.jsonl", "--output",
            directory / "train", "--num-steps", str(arguments.timed_steps), "--seed", str(number + 1),
            *variant.arguments, log=directory / "log.txt",
        )  # fmt: skip
        times = [line["timing_s/step"] for line in read_metrics(directory / "train")]
        # The first step allocates.
        step_s = statistics.median(times[1:] or times)
        rows.add([{"variant": variant.name, "round": number, "step_s": step_s, "steps_s": times}])


def run(arguments: argparse.Namespace, variant: Variant, seed: int) -> list[dict[str, Any]]:
    """One run from start or where it was, and its rows: one for each evaluated number of steps."""
    output: Path = arguments.output
    directory = output / "runs" / f"{variant.directory}-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    further = arguments.longer if variant.longer else 0
    marks = [arguments.steps + arguments.every * number for number in range(further + 1)]
    call(
        TOOLS / "train_rl.py", "--load", output / "mcore", "--data", output / "data" / "train.jsonl", "--output",
        directory / "train", "--num-steps", str(marks[-1]), "--seed", str(seed), "--save-interval",
        str(arguments.every), "--keep-checkpoints", str(further + 1), "--resume", *variant.arguments, log=log,
    )  # fmt: skip
    metrics = read_metrics(directory / "train")
    rows = []
    for mark in marks:
        model = directory / f"model-{mark}"
        if not model.is_dir():
            call(
                TOOLS / "convert_mcore_to_hf.py", "--mcore", directory / "train" / "checkpoints", "--iteration",
                str(mark), "--output", model, "--no-verify", log=log,
            )  # fmt: skip
        done = metrics[:mark]
        rows.append(
            {
                "variant": variant.name, "lr": variant.lr, "seed": seed, "steps": mark,
                **evaluate(output, model, directory / f"evaluation-{mark}", arguments.problems, log),
                "reward_last_10": statistics.mean(line["critic/rewards/mean"] for line in done[-10:]),
                "step_flops": operations(output, variant),
                "rewards": [round(line["critic/rewards/mean"], 6) for line in done],
            }
        )  # fmt: skip
    return rows


def look(arguments: argparse.Namespace, lr: str, seed: int) -> list[dict[str, Any]]:
    """One OISD run whose gradients are compared on the way; it leaves a file and no rows."""
    output: Path = arguments.output
    directory = output / "gradients" / lr
    if not (directory / f"{seed}.jsonl").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        oisd = Variant(name="OISD", flags="", lr=lr)
        call(
            DIAGNOSE, "--every", str(max(1, arguments.steps // 6)), "--out", directory / f"{seed}.jsonl", "--",
            "--load", output / "mcore", "--data", output / "data" / "train.jsonl", "--output",
            directory / f"run-{seed}", "--resume", "--num-steps", str(arguments.steps), "--seed", str(seed),
            *oisd.arguments, log=directory / f"{seed}.log",
        )  # fmt: skip
    return []


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--jobs", type=int, default=max(1, min(2, os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument("--steps", type=int, default=60, help="training steps at which variants are compared")
    parser.add_argument("--every", type=int, default=6, help="steps between GRPO's evaluations beyond them")
    parser.add_argument("--longer", type=int, default=5, help="how many of those")
    parser.add_argument("--seeds", type=int, help="of each variant, instead of its own number")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems")
    names = list(dict.fromkeys(variant.name for variant in VARIANTS))
    parser.add_argument("--variant", action="append", choices=names, help="only this (repeatable)")
    parser.add_argument("--lr", action="append", choices=[FAST, SLOW], help="only this learning rate (repeatable)")
    parser.add_argument("--looks", type=int, default=3, help="OISD runs of a learning rate whose gradients are kept")
    parser.add_argument("--rounds", type=int, default=3, help="in which the time of each variant's step is measured")
    parser.add_argument("--timed-steps", type=int, default=8, help="of each such measurement")
    parser.add_argument("--report", action="store_true", help="no runs: report what is finished")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.every < 1 or arguments.steps % arguments.every:
        raise OISDError(
            f"--steps {arguments.steps} is no multiple of --every {arguments.every}: checkpoints are that far"
        )
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    rows, times = Rows(output / "rows.jsonl"), Rows(output / "times.jsonl")
    if not arguments.report:
        prepare(output)
        chosen = [v for v in VARIANTS if not arguments.variant or v.name in arguments.variant]
        chosen = [v for v in chosen if not arguments.lr or v.lr in arguments.lr]
        step_times(arguments, chosen, times)
        # All variants with one seed, then the next: a study that is stopped early is smaller, not lopsided.
        most = max(arguments.seeds or v.seeds for v in chosen)
        todo = [
            (variant, seed)
            for seed in range(1, most + 1)
            for variant in chosen
            if seed <= (arguments.seeds or variant.seeds) and not rows.has(variant, seed)
        ]
        looks = [(lr, seed) for lr in arguments.lr or (FAST, SLOW) for seed in range(1, arguments.looks + 1)]
        total = len(todo) + len(looks)
        with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=total, desc="runs", unit="run") as bar:
            futures = [pool.submit(run, arguments, variant, seed) for variant, seed in todo]
            futures += [pool.submit(look, arguments, lr, seed) for lr, seed in looks]
            try:
                for future in as_completed(futures):
                    rows.add(future.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    from megatron_oisd.analysis.gradients import draw_gradients
    from megatron_oisd.analysis.study import write_report

    for lr in (FAST, SLOW):
        paths = sorted((output / "gradients" / lr).glob("*.jsonl"))
        lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
        if lines:
            draw_gradients([json.loads(line) for line in lines], output / f"gradients-{lr}.png")
    print(write_report(rows.rows, output, times=times.rows, baseline="GRPO", steps=arguments.steps))


if __name__ == "__main__":
    sys.exit(main())
