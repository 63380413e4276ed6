"""Evaluate a Hugging Face checkpoint on a problem set: Avg@K, Pass@k and every response.

    python tools/evaluate.py --model BASE --data math500.parquet --output runs/evaluation --label before
    python tools/evaluate.py --model TRAINED --data math500.parquet --output runs/evaluation --label after

Each call writes ``<label>.jsonl`` (one line per problem) and ``<label>.settings.json``, and brings ``table.md`` and
``table.json``, which compare all labels of the directory, and the figure ``evaluation.png`` up to date. With several
problem sets each has a directory of its own, and ``summary.md`` compares the labels over all sets. A call that was
interrupted goes on where it was when it is repeated.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_oisd.analysis.evaluation import draw_evaluations, write_summary
from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.data import TokenizedPrompt, load_prompts, tokenize_prompts
from megatron_oisd.rl.evaluate import (
    EvaluationResult,
    ProblemLog,
    evaluate_engine,
    read_problems,
    write_problems,
    write_table,
)
from megatron_oisd.rl.rewards import REWARDS, get_reward
from megatron_oisd.rl.rollout.base import RolloutEngine, SamplingParams


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="problem sets, .parquet or .jsonl")
    parser.add_argument("--output", required=True, type=Path, help="directory of the results")
    parser.add_argument("--label", required=True, help="this model's row in the table, for example before or after")
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[16], help="K, responses per problem: one number, or one for each set"
    )
    parser.add_argument("--max-new-tokens", type=int, default=8192, help="response limit in tokens")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward", default="exact_match", help=f"one of {', '.join(sorted(REWARDS))}")
    parser.add_argument("--limit", type=int, help="use the first problems of each set only")
    parser.add_argument("--batch", type=int, default=64, help="most responses generated at once")
    parser.add_argument("--system-prompt", help="for problems that bring none")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="who samples")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise OISDError for values that would fail only after the model is loaded."""
    for name in ("samples", "max_new_tokens", "max_prompt_tokens", "batch", "limit"):
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise OISDError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if len(arguments.samples) not in (1, len(arguments.data)):
        raise OISDError(
            f"--samples has {len(arguments.samples)} numbers for {len(arguments.data)} sets: give one, or one each"
        )
    stems = [path.stem for path in arguments.data]
    if len(set(stems)) != len(stems):
        raise OISDError(f"--data names two sets {sorted(stems)} alike: results are kept by file name; rename one")
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


def update_table(directory: Path, label: str, result: EvaluationResult) -> None:
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


class ProblemSet(NamedTuple):
    """One data file of the command, tokenized, and where its results go."""

    name: str
    prompts: list[TokenizedPrompt]
    samples: int
    directory: Path
    settings: dict[str, Any]


def load_sets(arguments: argparse.Namespace, tokenizer: Any) -> list[ProblemSet]:
    """Read every set before anything is sampled, so that a bad file is told at once."""
    samples = arguments.samples * len(arguments.data) if len(arguments.samples) == 1 else arguments.samples
    several = len(arguments.data) > 1
    sets = []
    for path, count in zip(arguments.data, samples, strict=True):
        records = load_prompts(path, system_prompt=arguments.system_prompt)[: arguments.limit]
        prompts, dropped = tokenize_prompts(records, tokenizer, max_prompt_tokens=arguments.max_prompt_tokens)
        if dropped:
            print(
                f"{path}: {dropped} of {len(records)} prompts are over {arguments.max_prompt_tokens} tokens, left out"
            )
        chosen = {**vars(arguments), "data": path, "samples": count}
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
        weights = sorted(Path(arguments.model).glob("*.safetensors"))
        settings |= {"prompts_left_out": dropped, "weights": [[p.name, p.stat().st_size] for p in weights]}
        directory = arguments.output / path.stem if several else arguments.output
        sets.append(ProblemSet(path.stem, prompts, count, directory, settings))
    return sets


def make_engine(arguments: argparse.Namespace, sampling: SamplingParams) -> RolloutEngine:
    """The engine with the checkpoint's own weights."""
    import torch

    dtype = getattr(torch, arguments.dtype)
    if arguments.engine == "vllm":
        from megatron_oisd.rl.rollout.vllm_engine import VLLMEngine

        return VLLMEngine.from_pretrained(arguments.model, sampling=sampling, dtype=dtype, memory_fraction=0.9)
    from megatron_oisd.rl.rollout.transformers_engine import TransformersEngine

    return TransformersEngine.from_pretrained(arguments.model, dtype=dtype)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Load, sample, score, write."""
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    reward = get_reward(arguments.reward)
    tokenizer = load_tokenizer(arguments.model)
    sets = load_sets(arguments, tokenizer)
    sampling = SamplingParams(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, top_p=arguments.top_p
    )
    logs = [ProblemLog(s.directory / f"{arguments.label}.unfinished.jsonl", s.settings) for s in sets]
    engine = make_engine(arguments, sampling)
    try:
        with tqdm(total=sum(len(s.prompts) * s.samples for s in sets), unit="response") as bar:
            for problem_set, log in zip(sets, logs, strict=True):
                bar.set_description(problem_set.name)
                result = evaluate_engine(
                    engine, problem_set.prompts, tokenizer, reward, sampling, samples_per_prompt=problem_set.samples,
                    seed=arguments.seed, batch=arguments.batch, progress=bar.update, log=log,
                )  # fmt: skip
                directory, label = problem_set.directory, arguments.label
                write_problems(result, directory / f"{label}.jsonl")
                (directory / f"{label}.settings.json").write_text(json.dumps(problem_set.settings, indent=2) + "\n")
                update_table(directory, label, result)
                log.close(remove=True)
    finally:
        engine.close()
        for log in logs:
            log.close(remove=False)
    tables = {s.name: s.directory / "table.json" for s in sets}
    for name, table in tables.items():
        print(f"{name}\n\n{table.with_suffix('.md').read_text(encoding='utf-8')}")
    figure, _ = draw_evaluations(tables, arguments.output / "evaluation.png")
    if len(sets) > 1:
        print(write_summary(tables, arguments.output))
    print(f"figure: {figure}")


if __name__ == "__main__":
    sys.exit(main(None))
