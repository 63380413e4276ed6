"""Avg@K, Pass@k and intervals against slow counts; the evaluation loop and its files with a scripted engine."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.data import PromptRecord, TokenizedPrompt
from megatron_oisd.rl.evaluate import (
    EvaluationResult,
    ProblemLog,
    ProblemResult,
    avg_at_k,
    bootstrap_interval,
    evaluate_engine,
    pass_at_k,
    read_problems,
    write_problems,
    write_table,
)
from megatron_oisd.rl.rewards import exact_match
from megatron_oisd.rl.rollout.base import Rollout, SamplingParams

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"


def test_avg_at_k_weighs_problems_equally() -> None:
    assert avg_at_k([[True, False], [True, True]]) == 0.75
    assert avg_at_k([[True], [False, False, False]]) == 0.5
    for nothing in ([], [[True], []]):
        with pytest.raises(OISDError, match="at least one"):
            avg_at_k(nothing)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_average_over_all_subsets(n: int, c: int) -> None:
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


def test_pass_at_k_extremes() -> None:
    assert pass_at_k(300, 1, 1) == 1 / 300
    assert pass_at_k(300, 1, 256) == 256 / 300
    assert pass_at_k(300, 45, 256) == 1.0  # 255 wrong ones cannot fill 256 places
    # Both binomials are far beyond a float here (C(10000, 5000) is about 1e3008); 1 - (1 - p) would lose digits.
    missed = Fraction(1)
    for place in range(5000):
        missed *= Fraction(9999 - place, 10_000 - place)
    assert pass_at_k(10_000, 1, 5000) == float(1 - missed) == 0.5


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_the_undefined(n: int, c: int, k: int) -> None:
    with pytest.raises(OISDError, match=f"Pass@{k}"):
        pass_at_k(n, c, k)


def test_bootstrap_interval() -> None:
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    values = np.random.default_rng(1).normal(0.5, 0.2, size=400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval(values) == (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


class ScriptedEngine:
    """A prompt is two tokens, the right answer and the chance of giving it in per cent."""

    weights_version = 0

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, list[int]]] = []
        self.closed = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        samples_per_prompt: int = 1,
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        self.calls.append((len(prompts), samples_per_prompt, list(seeds)))
        answers = []
        for (answer, percent), seed in zip(prompts, seeds, strict=True):
            generator = np.random.default_rng(seed)
            samples = []
            for _ in range(samples_per_prompt):
                right = generator.random() * 100 < percent
                length = 3 if right else sampling.max_new_tokens
                ids = [answer if right else -1, *[0] * (length - 1)]
                samples.append(
                    Rollout(
                        prompt_ids=[answer, percent],
                        response_ids=ids,
                        logprobs=[-1.0] * length,
                        finish_reason="stop" if right else "length",
                    )
                )
            answers.append(samples)
        return answers

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        raise AssertionError("an evaluation changes no weights")

    def close(self) -> None:
        self.closed = True


class BoxTokenizer:
    """Decodes a response to its first token in a box."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return f"\\boxed{{{ids[0]}}}"


def prompts(*percents: int) -> list[TokenizedPrompt]:
    return [
        TokenizedPrompt(PromptRecord(f"p{i}", [{"role": "user", "content": "?"}], str(i), "toy"), [i, percent])
        for i, percent in enumerate(percents)
    ]


def evaluate(percents: Sequence[int], samples: int, *, seed: int = 0, **options: Any) -> EvaluationResult:
    engine = options.pop("engine", None) or ScriptedEngine()
    sampling = SamplingParams(max_new_tokens=10)
    return evaluate_engine(
        engine,
        prompts(*percents),
        BoxTokenizer(),
        exact_match,
        sampling,
        samples_per_prompt=samples,
        seed=seed,
        **options,
    )


def test_summary_of_known_outcomes() -> None:
    summary = evaluate([100, 0, 100, 0], 6).summary
    assert summary["num_problems"] == 4
    assert summary["samples_per_prompt"] == 6
    assert summary["avg_at_k"] == 0.5
    assert summary["pass_at_k"] == {"1": 0.5, "2": 0.5, "4": 0.5}
    assert summary["response_length_mean"] == 6.5
    assert summary["truncated_fraction"] == 0.5
    low, high = summary["avg_at_k_interval"]
    assert low < 0.5 < high


def test_pass_at_one_is_avg_at_k_and_pass_grows_with_k() -> None:
    result = evaluate([10, 35, 60, 85, 50], 16)
    summary = result.summary
    assert list(summary["pass_at_k"]) == ["1", "2", "4", "8", "16"]
    assert summary["pass_at_k"]["1"] == pytest.approx(summary["avg_at_k"], abs=1e-15)
    values = list(summary["pass_at_k"].values())
    assert values == sorted(values)
    assert summary["pass_at_k"]["16"] == sum(any(problem.correct) for problem in result.problems) / 5


@pytest.mark.parametrize("batch", [1, 3, 4, 8, 64])
def test_batches_cover_every_sample_once(batch: int) -> None:
    engine = ScriptedEngine()
    done: list[int] = []
    result = evaluate([50] * 5, 4, engine=engine, batch=batch, progress=done.append)
    assert sum(done) == 20
    assert all(0 < number * samples <= max(batch, 1) for number, samples, _ in engine.calls)
    assert [len(problem.rewards) for problem in result.problems] == [4] * 5
    assert [problem.id for problem in result.problems] == [f"p{i}" for i in range(5)]
    seeds = [seed for _, _, seeds in engine.calls for seed in seeds]
    assert len(set(seeds)) == len(seeds), "problems that share a seed give correlated samples"
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = evaluate([50] * 6, 4, seed=3)

    class Failing(ScriptedEngine):
        def generate(self, *args: Any, **options: Any) -> list[list[Rollout]]:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().generate(*args, **options)

    path, settings = tmp_path / "a.unfinished.jsonl", {"seed": 3}
    with pytest.raises(KeyboardInterrupt):
        evaluate([50] * 6, 4, seed=3, batch=8, engine=Failing(), log=ProblemLog(path, settings))
    with path.open("a") as file:
        file.write('{"id": "p4", "half')  # killed in the middle of a line
    with pytest.raises(OISDError, match="other settings"):
        ProblemLog(path, {"seed": 4})
    log, engine, done = ProblemLog(path, settings), ScriptedEngine(), []
    assert sorted(log.finished) == ["p0", "p1", "p2", "p3"]
    assert evaluate([50] * 6, 4, seed=3, engine=engine, log=log, progress=done.append) == whole
    assert [number for number, _, _ in engine.calls] == [2]
    assert sum(done) == 24
    log.close(remove=True)
    assert not path.exists()


def test_a_problems_responses_do_not_depend_on_the_others() -> None:
    assert evaluate([50] * 6, 4, batch=8).problems[:2] == evaluate([50] * 2, 4).problems


def test_the_seed_decides() -> None:
    assert evaluate([50] * 8, 8, seed=3) == evaluate([50] * 8, 8, seed=3)
    assert evaluate([50] * 8, 8, seed=3) != evaluate([50] * 8, 8, seed=4)


def test_shaped_rewards_count_as_right_from_one() -> None:
    sampling = SamplingParams(max_new_tokens=2)
    for value, right in [(0.99, False), (1.0, True), (1.5, True), (-1.0, False)]:
        result = evaluate_engine(
            ScriptedEngine(), prompts(50), BoxTokenizer(), lambda *_, v=value: v, sampling, samples_per_prompt=2, seed=0
        )
        assert result.problems[0].correct == [right, right]
        assert result.problems[0].rewards == [value, value]


def test_evaluation_refusals() -> None:
    with pytest.raises(OISDError, match="no prompts"):
        evaluate([], 1)
    with pytest.raises(OISDError, match="samples_per_prompt 0"):
        evaluate([50], 0)
    one, two = evaluate([50], 1).problems[0], evaluate([50], 2).problems[0]
    with pytest.raises(OISDError, match=r"got \[1, 2\]"):
        EvaluationResult([one, two])


def test_problem_rows_survive_the_file(tmp_path: Path) -> None:
    result = evaluate([50, 100], 3)
    odd = ProblemResult(**{**vars(result.problems[0]), "id": "odd", "responses": ["a\u2028b", "c\nd", "é\r"]})
    result = EvaluationResult([*result.problems, odd])
    path = tmp_path / "new" / "rows.jsonl"
    write_problems(result, path)
    assert len(path.read_bytes().splitlines()) == 3
    assert read_problems(path) == result
    path.write_text('{"id": 1}\n')
    with pytest.raises(OISDError, match=r"rows\.jsonl: not per-problem results"):
        read_problems(path)
    with pytest.raises(OISDError, match="absent"):
        read_problems(tmp_path / "absent.jsonl")


def test_table(tmp_path: Path) -> None:
    results = {"before": evaluate([0, 0, 100, 100], 4), "after": evaluate([0, 100, 100, 100], 4)}
    write_table(results, tmp_path / "t.md", tmp_path / "t.json")
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0].split("|")[1:5] == [" model ", " problems ", " Avg@4 (95% CI) ", " Pass@2 "]
    assert lines[2].startswith("| before | 4 | 50.0 (")
    assert lines[3].startswith("| after | 4 | 75.0 (")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert any(line.startswith("| after - before | +25.0 (+0.0 to +75.0)") for line in lines)

    document = json.loads((tmp_path / "t.json").read_text())
    assert list(document["results"]) == ["before", "after"]
    assert document["results"]["after"]["avg_at_k"] == 0.75
    (difference,) = document["differences"]
    assert (difference["label"], difference["baseline"], difference["difference"]) == ("after", "before", 0.25)
    # In pairs a gain on one problem of four cannot look like a loss; apart, the two intervals overlap widely.
    assert difference["interval"][0] >= 0


def test_table_of_unlike_evaluations(tmp_path: Path) -> None:
    results = {"few": evaluate([50, 50], 2), "many|more": evaluate([50, 50, 50], 8)}
    write_table(results, tmp_path / "t.md", tmp_path / "t.json")
    text = (tmp_path / "t.md").read_text()
    assert "Avg@2 (95% CI) | Avg@8 (95% CI) | Pass@2 | Pass@4 | Pass@8" in text
    assert "many\\|more" in text
    assert "difference" not in text, "other problems, so no paired difference"
    assert json.loads((tmp_path / "t.json").read_text())["differences"] == []
    with pytest.raises(OISDError, match="no results"):
        write_table({}, tmp_path / "t.md", tmp_path / "t.json")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/evaluate.py with a scripted engine and tokenizer in place of a checkpoint."""
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Tokenizer(BoxTokenizer):
        chat_template = "toy"

        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
            return [int(number) for number in messages[-1]["content"].split()]

    engines = ModuleType("megatron_oisd.rl.rollout.transformers_engine")
    engines.TransformersEngine = type(  # type: ignore[attr-defined]
        "TransformersEngine", (), {"from_pretrained": staticmethod(lambda path, dtype: ScriptedEngine())}
    )
    monkeypatch.setitem(sys.modules, engines.__name__, engines)
    monkeypatch.setattr(module, "load_tokenizer", lambda path: Tokenizer())
    return module


def test_command_line_builds_one_table_from_several_calls(tool: ModuleType, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"

    def call(label: str, percent: int, *more: str) -> int:
        rows = [
            {"messages": [{"role": "user", "content": f"{i} {percent}"}], "ground_truth": str(i), "id": f"q{i}"}
            for i in range(6)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tool.main(
            [
                *["--model", "toy", "--data", str(data), "--output", str(tmp_path / "out"), "--label", label],
                *["--samples", "4", "--max-new-tokens", "8", "--limit", "5", *more],
            ]
        )

    assert call("before", 0) == 0
    assert call("after", 100) == 0
    assert call("before", 50) == 0, "a label is replaced in its place"
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(document["results"]) == ["before", "after"]
    assert document["results"]["after"]["avg_at_k"] == 1.0
    assert 0 < document["results"]["before"]["avg_at_k"] < 1
    assert document["results"]["after"]["num_problems"] == 5
    assert json.loads((tmp_path / "out" / "after.settings.json").read_text())["samples"] == 4
    assert len(read_problems(tmp_path / "out" / "after.jsonl").problems) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--label", "../x"], "--label '../x'"),
        (["--label", "table"], "--label 'table'"),
        (["--reward", "nope"], "reward 'nope'"),
        (["--data", "absent.parquet"], "absent.parquet: no such file"),
    ],
)
def test_command_line_refuses_in_one_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    base = ["--model", "toy", "--data", "x.jsonl", "--output", str(tmp_path), "--label", "a"]
    assert tool.main([*base, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
