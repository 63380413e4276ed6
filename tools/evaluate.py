"""Evaluate a Hugging Face checkpoint on a problem set: Avg@K, Pass@k and every response.

    python tools/evaluate.py --model BASE --data math500.parquet --output runs/evaluation --label before
    python tools/evaluate.py --model TRAINED --data math500.parquet --output runs/evaluation --label after

Each call writes ``<label>.jsonl`` (one line per problem) and ``<label>.settings.json``, and brings ``table.md`` and
``table.json``, which compare all labels of the directory, up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.data import load_prompts, tokenize_prompts
from megatron_oisd.rl.evaluate import EvaluationResult, evaluate_engine, read_problems, write_problems, write_table
from megatron_oisd.rl.rewards import REWARDS, get_reward
from megatron_oisd.rl.rollout.base import SamplingParams


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--data", required=True, type=Path, help="problems, .parquet or .jsonl")
    parser.add_argument("--output", required=True, type=Path, help="directory of the results")
    parser.add_argument("--label", required=True, help="this model's row in the table, for example before or after")
    parser.add_argument("--samples", type=int, default=16, help="K, responses per problem")
    parser.add_argument("--max-new-tokens", type=int, default=8192, help="response limit in tokens")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", default="exact_match", help=f"one of {', '.join(sorted(REWARDS))}")
    parser.add_argument("--limit", type=int, help="use the first problems only")
    parser.add_argument("--batch", type=int, default=64, help="most responses generated at once")
    parser.add_argument("--system-prompt", help="for problems that bring none")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise OISDError for values that would fail only after the model is loaded."""
    for name in ("samples", "max_new_tokens", "max_prompt_tokens", "batch", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise OISDError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if not arguments.temperature >= 0:
        raise OISDError(f"--temperature {arguments.temperature}: expected 0 (greedy) or more")
    if not 0 < arguments.top_p <= 1:
        raise OISDError(f"--top-p {arguments.top_p}: expected more than 0 and at most 1")
    if not re.fullmatch(r"[\w.+-]+", arguments.label) or arguments.label in (".", "..", "table"):
        raise OISDError(f"--label {arguments.label!r}: it names a file; use letters, digits, '.', '_', '+', '-'")


def load_tokenizer(path: str) -> Any:
    """Return the checkpoint's tokenizer."""
    if not Path(path).is_dir():
        raise OISDError(f"--model {path}: no such directory; give a Hugging Face checkpoint on this machine")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds, some with long texts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OISDError(
            f"--model {path}: no tokenizer can be loaded ({reason}); give a checkpoint directory"
        ) from error


def update_table(directory: Path, label: str, result: EvaluationResult) -> str:
    """Rewrite the table of ``directory`` with ``label`` added or replaced, rows in the order they were first made."""
    table = directory / "table.json"
    try:
        labels = list(json.loads(table.read_text(encoding="utf-8"))["results"]) if table.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OISDError(f"{table}: not a table of this tool; remove it or choose another --output") from error
    results = {
        name: result if name == label else read_problems(directory / f"{name}.jsonl")
        for name in dict.fromkeys([*labels, label])
    }
    write_table(results, directory / "table.md", table)
    return (directory / "table.md").read_text(encoding="utf-8")


@command_line
def main(argv: list[str] | None = None) -> None:
    """Load, sample, score, write."""
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    reward = get_reward(arguments.reward)
    records = load_prompts(arguments.data, system_prompt=arguments.system_prompt)[: arguments.limit]
    tokenizer = load_tokenizer(arguments.model)
    prompts, dropped = tokenize_prompts(records, tokenizer, max_prompt_tokens=arguments.max_prompt_tokens)
    if dropped:
        print(f"{dropped} of {len(records)} prompts are over {arguments.max_prompt_tokens} tokens and left out")

    from megatron_oisd.rl.rollout.transformers_engine import TransformersEngine

    engine = TransformersEngine.from_pretrained(arguments.model)
    sampling = SamplingParams(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, top_p=arguments.top_p
    )
    try:
        with tqdm(total=len(prompts) * arguments.samples, unit="response") as bar:
            result = evaluate_engine(
                engine,
                prompts,
                tokenizer,
                reward,
                sampling,
                samples_per_prompt=arguments.samples,
                seed=arguments.seed,
                batch=arguments.batch,
                progress=bar.update,
            )
    finally:
        engine.close()

    write_problems(result, arguments.output / f"{arguments.label}.jsonl")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    settings["prompts_left_out"] = dropped
    (arguments.output / f"{arguments.label}.settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(update_table(arguments.output, arguments.label, result))


if __name__ == "__main__":
    sys.exit(main(None))
