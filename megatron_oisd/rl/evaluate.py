"""Held-out evaluation: Avg@K and Pass@k of a rollout engine on a set of problems, with its uncertainty.

Avg@K is the mean over problems of the fraction of K samples that are right. Pass@k is the unbiased estimate that at
least one of k samples is right. Intervals are 95% percentile bootstraps over the problems: they answer "would another
draw of such problems give another number?", not how much the training seed matters.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.data import TokenizedPrompt
from megatron_oisd.rl.rewards import RewardFn
from megatron_oisd.rl.rollout.base import Rollout, RolloutEngine, SamplingParams


def avg_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """Return the mean over problems of the fraction of samples that are right; ``correct[problem][sample]``.

    Every problem counts the same, whatever its number of samples.

    Raises:
        OISDError: there are no problems, or one has no samples.
    """
    if not correct or any(len(samples) == 0 for samples in correct):
        raise OISDError("Avg@K needs at least one problem and one sample for each")
    return math.fsum(sum(map(bool, samples)) / len(samples) for samples in correct) / len(correct)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate ``1 - C(n - c, k) / C(n, k)`` of "one of k samples is right".

    Formed from whole numbers, with one correctly rounded division at the end: no cancellation and no overflow,
    whatever n. Source of the estimator: Chen et al., Evaluating Large Language Models Trained on Code (2021).

    Raises:
        OISDError: not ``0 <= c <= n`` or not ``1 <= k <= n``.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise OISDError(
            f"Pass@{k} of {num_correct} right among {num_samples} samples is not defined; "
            "need 0 <= right <= samples and 1 <= k <= samples"
        )
    choices = math.comb(num_samples, k)
    return (choices - math.comb(num_samples - num_correct, k)) / choices


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of ``values`` (one per problem); seeded, so repeatable."""
    if len(values) == 0:
        raise OISDError("an interval needs at least one problem")
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // len(data))  # at most 16 MB of indices at a time
    means = np.concatenate(
        [
            data[generator.integers(len(data), size=(min(chunk, resamples - start), len(data)))].mean(axis=1)
            for start in range(0, resamples, chunk)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """What the K samples of one problem came to; the lists are aligned, lengths in tokens."""

    id: str
    data_source: str
    ground_truth: str
    rewards: list[float]
    correct: list[bool]
    response_lengths: list[int]
    truncated: list[bool]
    responses: list[str]


@dataclass(frozen=True)
class EvaluationResult:
    """The per-problem rows of one evaluated model; every problem has the same number of samples."""

    problems: list[ProblemResult]

    def __post_init__(self) -> None:
        counts = {len(problem.correct) for problem in self.problems}
        if len(counts) != 1 or 0 in counts:
            raise OISDError(f"an evaluation needs problems with one number of samples each, got {sorted(counts)}")

    @property
    def samples_per_prompt(self) -> int:
        """K, the number of samples of every problem."""
        return len(self.problems[0].correct)

    @property
    def accuracies(self) -> list[float]:
        """The fraction of right samples of each problem, in order."""
        return [sum(problem.correct) / len(problem.correct) for problem in self.problems]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The numbers of the table.

        ``num_problems``, ``samples_per_prompt``, ``avg_at_k`` with ``avg_at_k_interval``, ``pass_at_k`` (k as text ->
        mean over problems, for k = 1, 2, 4, ... up to K), ``response_length_mean`` in tokens, ``truncated_fraction``.
        """
        count = self.samples_per_prompt
        lengths = [length for problem in self.problems for length in problem.response_lengths]
        truncated = [cut for problem in self.problems for cut in problem.truncated]
        return {
            "num_problems": len(self.problems),
            "samples_per_prompt": count,
            "avg_at_k": avg_at_k([problem.correct for problem in self.problems]),
            "avg_at_k_interval": list(bootstrap_interval(self.accuracies)),
            "pass_at_k": {
                str(k): math.fsum(pass_at_k(count, sum(problem.correct), k) for problem in self.problems)
                / len(self.problems)
                for k in (2**power for power in range(count.bit_length()))
            },
            "response_length_mean": sum(lengths) / len(lengths),
            "truncated_fraction": sum(truncated) / len(truncated),
        }


def evaluate_engine(
    engine: RolloutEngine,
    prompts: Sequence[TokenizedPrompt],
    tokenizer: Any,
    reward: RewardFn,
    sampling: SamplingParams,
    *,
    samples_per_prompt: int,
    seed: int,
    batch: int = 64,
    progress: Callable[[int], object] | None = None,
    log: ProblemLog | None = None,
) -> EvaluationResult:
    """Sample every prompt and score the responses.

    Args:
        engine: the rollout engine; it keeps its weights.
        prompts: the problems, from :func:`megatron_oisd.rl.data.tokenize_prompts`.
        tokenizer: decodes the responses (special tokens left out).
        reward: scores a response; one of at least 1 counts as right.
        sampling: temperature, top_p and the response limit in tokens.
        samples_per_prompt: K.
        seed: with a problem's id it fixes its responses, whatever else is evaluated with it.
        batch: most responses asked of the engine in one call.
        progress: called with the number of responses just finished, for example ``tqdm.update``.
        log: keeps finished problems, and gives those that an earlier, interrupted evaluation finished.

    Raises:
        OISDError: no prompts, or ``samples_per_prompt`` or ``batch`` below 1.
    """
    if not prompts:
        raise OISDError("nothing to evaluate: no prompts; check the data file and the prompt length limit")
    if samples_per_prompt < 1 or batch < 1:
        raise OISDError(f"samples_per_prompt {samples_per_prompt} and batch {batch} must both be at least 1")
    results: dict[int, ProblemResult] = {}
    for number, prompt in enumerate(prompts):
        known = log.finished.get(prompt.record.id) if log is not None else None
        if known is not None:
            results[number] = known
            if progress is not None:
                progress(samples_per_prompt)
    todo = [number for number in range(len(prompts)) if number not in results]
    group = max(1, batch // samples_per_prompt)
    for start in range(0, len(todo), group):
        numbers = todo[start : start + group]
        rollouts: dict[int, list[Rollout]] = {number: [] for number in numbers}
        for first in range(0, samples_per_prompt, batch):
            count = min(batch, samples_per_prompt - first)
            seeds = [_derived_seed(seed, prompts[number].record.id, first) for number in numbers]
            token_ids = [prompts[number].token_ids for number in numbers]
            answers = engine.generate(token_ids, sampling, samples_per_prompt=count, seeds=seeds)
            assert [len(samples) for samples in answers] == [count] * len(numbers), "engine broke its protocol"
            for number, samples in zip(numbers, answers, strict=True):
                rollouts[number].extend(samples)
            if progress is not None:
                progress(count * len(numbers))
        for number in numbers:
            results[number] = _score(prompts[number], rollouts[number], tokenizer, reward)
            if log is not None:
                log.add(results[number])
    return EvaluationResult([results[number] for number in range(len(prompts))])


class ProblemLog:
    """Finished problems of an evaluation that is under way, one line each, after a line of its settings.

    Args:
        path: of the file; :meth:`close` removes it.
        settings: of the evaluation. A file with others is not gone on with.

    Raises:
        OISDError: the file is of an evaluation with other settings, or cannot be read or written.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.finished: dict[str, ProblemResult] = {}
        """By problem id."""
        header = json.dumps(settings, sort_keys=True)
        try:
            if self.path.exists():
                self._read(header)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")  # again from the start: drops a half-written line
            self._file.write(header + "\n")
            for problem in self.finished.values():
                self.add(problem)
        except OSError as error:
            raise OISDError(f"{self.path}: cannot be used ({error.strerror}); choose another --output") from error

    def _read(self, header: str) -> None:
        first, *lines = self.path.read_text(encoding="utf-8").split("\n")
        if not lines:  # killed before its first line was whole
            return
        if first != header:
            raise OISDError(
                f"{self.path}: an unfinished evaluation with other settings; repeat it with those to finish it, remove "
                "the file, or choose another --label"
            )
        for line in lines[:-1]:
            try:
                problem = ProblemResult(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise OISDError(f"{self.path}: not an evaluation's log ({error}); remove the file") from error
            self.finished[problem.id] = problem

    def add(self, problem: ProblemResult) -> None:
        """Keep a finished problem."""
        self._file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self, *, remove: bool) -> None:
        """Close the file; remove it where its content stands elsewhere now."""
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)


def write_problems(result: EvaluationResult, path: str | Path) -> None:
    """Write one JSON object per problem, the fields of :class:`ProblemResult`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in result.problems]
    path.write_text("".join(lines), encoding="utf-8")


def read_problems(path: str | Path) -> EvaluationResult:
    """Read what :func:`write_problems` wrote.

    Raises:
        OISDError: the file is missing or holds something else.
    """
    try:
        # Not splitlines(): a response may hold other line separators of Unicode.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return EvaluationResult([ProblemResult(**json.loads(line)) for line in lines if line])
    except OISDError as error:
        raise OISDError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise OISDError(f"{path}: not per-problem results ({error}); evaluate again or remove the file") from error


def write_table(results: Mapping[str, EvaluationResult], path_md: str | Path, path_json: str | Path) -> None:
    """Write the comparison of several evaluations, rows in the order of ``results``, for example "before", "after".

    The JSON file holds ``{"results": {label: summary}, "differences": [...]}``. A difference compares a later row with
    the first one where both hold the same problems: its interval resamples problems in pairs, which is far narrower
    than what the two separate intervals suggest.

    Raises:
        OISDError: ``results`` is empty.
    """
    if not results:
        raise OISDError("no results to tabulate; evaluate at least one model")
    summaries = {label: result.summary for label, result in results.items()}
    differences = _paired_differences(results)
    counts = sorted({summary["samples_per_prompt"] for summary in summaries.values()})
    powers = sorted({int(k) for summary in summaries.values() for k in summary["pass_at_k"]} - {1})

    header = ["model", "problems", *(f"Avg@{count} (95% CI)" for count in counts), *(f"Pass@{k}" for k in powers)]
    header += ["mean response (tokens)", "truncated"]
    rows = []
    for label, summary in summaries.items():
        average = f"{_percent(summary['avg_at_k'])} ({_interval(summary['avg_at_k_interval'])})"
        row = [label.replace("|", "\\|"), str(summary["num_problems"])]
        row += [average if count == summary["samples_per_prompt"] else "-" for count in counts]
        row += [_percent(summary["pass_at_k"][str(k)]) if str(k) in summary["pass_at_k"] else "-" for k in powers]
        rows.append([*row, f"{summary['response_length_mean']:.0f}", _percent(summary["truncated_fraction"])])
    text = _markdown(header, rows)
    if differences:
        columns = ["difference in Avg@K", "points (95% CI, paired)"]
        text += "\n" + _markdown(
            columns,
            [
                [
                    f"{entry['label']} - {entry['baseline']}".replace("|", "\\|"),
                    f"{100 * entry['difference']:+.1f} ({_interval(entry['interval'], sign=True)})",
                ]
                for entry in differences
            ],
        )
    text += "\nPer cent. Intervals: bootstrap over problems; they leave out the spread between training seeds.\n"

    document = {"results": summaries, "differences": differences}
    for path, content in ((path_md, text), (path_json, json.dumps(document, indent=2, ensure_ascii=False) + "\n")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content, encoding="utf-8")


def _score(prompt: TokenizedPrompt, samples: Sequence[Rollout], tokenizer: Any, reward: RewardFn) -> ProblemResult:
    record = prompt.record
    responses = [tokenizer.decode(sample.response_ids, skip_special_tokens=True) for sample in samples]
    rewards = [float(reward(response, record.ground_truth)) for response in responses]
    return ProblemResult(
        id=record.id,
        data_source=record.data_source,
        ground_truth=record.ground_truth,
        rewards=rewards,
        correct=[value >= 1 for value in rewards],
        response_lengths=[len(sample.response_ids) for sample in samples],
        truncated=[sample.finish_reason == "length" for sample in samples],
        responses=responses,
    )


def _derived_seed(seed: int, prompt: str, sample: int) -> int:
    """Return a 31-bit seed for one problem: problems of one evaluation must not share their random numbers."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _paired_differences(results: Mapping[str, EvaluationResult]) -> list[dict[str, Any]]:
    (baseline, first), *others = results.items()
    by_problem = dict(zip(_keys(first), first.accuracies, strict=True))
    differences = []
    for label, result in others:
        keys = _keys(result)
        if len(keys) != len(by_problem) or set(keys) != set(by_problem):
            continue
        changes = [value - by_problem[key] for key, value in zip(keys, result.accuracies, strict=True)]
        low, high = bootstrap_interval(changes)
        mean = math.fsum(changes) / len(changes)
        differences.append({"label": label, "baseline": baseline, "difference": mean, "interval": [low, high]})
    return differences


def _keys(result: EvaluationResult) -> list[tuple[str, str, str]]:
    return [(problem.data_source, problem.id, problem.ground_truth) for problem in result.problems]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _interval(interval: Sequence[float], *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return " to ".join(format(100 * bound, form) for bound in interval)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
