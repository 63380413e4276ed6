"""The main job in one command, small enough for a laptop: make a model, convert, train with GRPO + OISD, evaluate.

Every stage is an ordinary command of the project, printed before it runs, so that it can be repeated by hand:

1. ``make_model.py`` and ``arithmetic.py``: a tiny Qwen3 checkpoint that is right part of the time, and its problems;
2. ``tools/convert_hf_to_mcore.py``: to a Megatron-Core distributed checkpoint, logits compared;
3. ``tools/evaluate.py``: Avg@K and Pass@K on held-out problems before training;
4. ``tools/train_rl.py`` under torchrun: 2 ranks, PP 2, the student layer on the first stage, the teacher on the last;
5. ``tools/convert_mcore_to_hf.py``: back to Hugging Face, logits compared;
6. ``tools/evaluate.py`` again, and ``tools/plot_training.py``: table and figure.

Flags that this script does not know go to the training command and win over its own: ``--tp 2 --pp 1``,
``--oisd-lambda-think 0 --oisd-lambda-attn 0`` (plain GRPO), ...
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.arguments import parse_arguments
from megatron_oisd.runtime.distributed import check_world_size

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "quickstart"
TOOLS = ROOT / "tools"

# What the tiny model needs to learn in minutes; the paper's recipe is the default of tools/train_rl.py.
RECIPE = {
    "--pp": "2",
    "--oisd-layers": "2",
    "--num-steps": "60",
    "--prompts-per-step": "32",
    "--mini-batch-prompts": "16",
    "--samples-per-prompt": "8",
    "--micro-batch-size": "32",
    "--max-prompt-tokens": "128",
    "--max-response-tokens": "40",
    "--lr": "3e-4",
    "--adam-beta2": "0.95",
    "--save-interval": "30",
}

SMOKE = {"--num-steps": "2", "--prompts-per-step": "4", "--mini-batch-prompts": "2", "--micro-batch-size": "8"}
SMOKE_MODEL = [
    "--max-steps",
    "4",
    "--eval-from",
    "4",
    "--eval-every",
    "4",
    "--eval-problems",
    "8",
    "--lr-warmup-steps",
    "1",
]


def free_directory(path: Path) -> None:
    """Move an earlier run aside, so that nothing is lost."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} exists already: moved to {aside}")


def stage(title: str, command: list[str]) -> None:
    """Run one stage with the terminal's own output and stop at the first that fails."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("PYTHONWARNINGS", "ignore")
    # Waiting threads that spin take the core from whatever else runs: a busy machine then gets many times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start = time.monotonic()
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise OISDError(f"stage {title!r} ended with exit code {code}: its message is above; mend that and run again")
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the training stage")
    parser.add_argument("--seed", type=int, default=1, help="seed of warm-up, problems and training")
    parser.add_argument("--tied", action="store_true", help="tie the model's embeddings")
    parser.add_argument("--eval-samples", type=int, default=8, help="samples per held-out problem (K)")
    parser.add_argument(
        "--smoke", action="store_true", help="run every stage in small: shows that it works, not that it learns"
    )
    arguments, further = parser.parse_known_args(argv)

    start = time.monotonic()
    out: Path = arguments.output
    recipe = [part for pair in (RECIPE | (SMOKE if arguments.smoke else {})).items() for part in pair]
    training = [
        "--load", str(out / "mcore"), "--data", str(out / "data/train.jsonl"), "--output", str(out / "train"),
        "--seed", str(arguments.seed), *recipe, *further,
    ]  # fmt: skip
    config, _ = parse_arguments(training)  # a wrong flag is reported now, not after the stages before training
    check_world_size(arguments.ranks, config.tp, config.pp)
    free_directory(out)
    out.mkdir(parents=True)
    python, seed = sys.executable, str(arguments.seed)
    threads = str(max(1, min(2, os.cpu_count() or 1)))
    samples, limit = ("2", "8") if arguments.smoke else (str(arguments.eval_samples), "128")

    def evaluate(model: Path, label: str) -> None:
        stage(
            f"evaluate {label}",
            [
                python, str(TOOLS / "evaluate.py"), "--model", str(model), "--data", str(out / "data/heldout.jsonl"),
                "--samples", samples, "--limit", limit, "--max-new-tokens", "40", "--seed", seed,
                "--output", str(out / "evaluation"), "--label", label,
            ],
        )  # fmt: skip

    stage("problems", [python, str(EXAMPLE / "arithmetic.py"), "--out", str(out / "data"), "--seed", seed])
    stage(
        "make a small model",
        [
            python, str(EXAMPLE / "make_model.py"), "--out", str(out / "model"), "--seed", seed, "--threads", threads,
            *(["--tied"] if arguments.tied else []), *(SMOKE_MODEL if arguments.smoke else []),
        ],
    )  # fmt: skip
    stage(
        "convert HF to Megatron-Core",
        [python, str(TOOLS / "convert_hf_to_mcore.py"), "--hf", str(out / "model"), "--output", str(out / "mcore")],
    )
    evaluate(out / "model", "before")
    stage(
        "train with GRPO + OISD",
        [
            python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}",
            str(TOOLS / "train_rl.py"), *training,
        ],
    )  # fmt: skip
    stage(
        "convert Megatron-Core to HF",
        [
            python, str(TOOLS / "convert_mcore_to_hf.py"), "--mcore", str(out / "train/checkpoints"), "--output",
            str(out / "model-trained"),
        ],
    )  # fmt: skip
    evaluate(out / "model-trained", "after")
    stage(
        "draw",
        [
            python, str(TOOLS / "plot_training.py"), "--run", f"GRPO + OISD={out / 'train'}", "--evaluation",
            str(out / "evaluation/table.json"), "--output", str(out / "training.png"),
        ],
    )  # fmt: skip
    print(f"\n{(out / 'evaluation/table.md').read_text(encoding='utf-8')}")
    print(f"Done in {time.monotonic() - start:.0f} s. Look at {out / 'training.png'};")
    print(f"metrics: {out / 'train/metrics.jsonl'} (tensorboard --logdir {out / 'train'})")


if __name__ == "__main__":
    sys.exit(main())
