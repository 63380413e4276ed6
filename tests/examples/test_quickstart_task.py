"""The quickstart's generated task, its tokenizer and its tiny model."""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import SamplingParams
from megatron_oisd.rl.rollout.transformers_engine import TransformersEngine

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import arithmetic
import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model.make_random_model(tmp_path_factory.mktemp("model"), seed=0, tied=False, layers=2)


def test_splits_share_no_expression_whatever_the_seeds() -> None:
    train = {problem.expression for problem in islice(arithmetic.problem_stream("train", seed=0), 5000)}
    heldout = {problem.expression for problem in islice(arithmetic.problem_stream("heldout", seed=1), 2000)}
    assert train
    assert heldout
    assert train.isdisjoint(heldout)


def test_ground_truths_are_the_value_of_the_expression() -> None:
    for problem in islice(arithmetic.problem_stream("train", seed=3, largest=50), 1000):
        numbers = re.findall(r"\d+", problem.question)
        assert numbers == re.findall(r"\d+", problem.expression)
        assert problem.answer == eval(problem.expression) >= 0
        assert problem.worked_solution.endswith(f"\\boxed{{{problem.answer}}}")
        steps = problem.worked_solution.split(". ")[0].split(", ")
        assert len(steps) == 2
        for left, right in (step.split("=") for step in steps):
            assert eval(left) == int(right)


def test_problems_are_deterministic_and_distinct() -> None:
    problems = arithmetic.make_problems("train", 500, seed=5)
    assert problems == arithmetic.make_problems("train", 500, seed=5)
    assert problems != arithmetic.make_problems("train", 500, seed=6)
    assert len({problem.expression for problem in problems}) == 500
    with pytest.raises(OISDError, match="different ones"):
        arithmetic.make_problems("heldout", 50, seed=0, largest=2)


def test_command_writes_what_the_loader_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--train", "20", "--heldout", "10"]
    assert arithmetic.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert set(rows[0]) == {"id", "messages", "ground_truth", "data_source"}
    assert [message["role"] for message in rows[0]["messages"]] == ["user"]
    assert arithmetic.main([*arguments, "--system-prompt"]) == 0
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert row["messages"][0] == {"role": "system", "content": arithmetic.SYSTEM_PROMPT}
    assert arithmetic.main([*arguments, "--largest", "1"]) == 2
    assert "largest=1" in capsys.readouterr().err


def test_tokenizer_round_trips_unicode_and_splits_digits(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) <= make_model.VOCABULARY
    for text in (
        "Let $\\int_0^{\\infty} e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$; 1234 apples",
        "  naïve Ελληνικά 数学 🙂\n\ttabs  ",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    digits = tokenizer.encode("90210", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in digits] == list("90210")
    problem = arithmetic.make_problems("train", 1, seed=0)[0]
    assert len(tokenizer.encode(problem.worked_solution, add_special_tokens=False)) < 40


def test_chat_template_and_special_tokens(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert ids.count(tokenizer.eos_token_id) == 2


def test_tokenizer_is_deterministic(checkpoint: Path, tmp_path: Path) -> None:
    again = make_model.make_random_model(tmp_path, seed=0, tied=False, layers=2)
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (checkpoint / name).read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_random_model_generates(tied: bool, tmp_path: Path) -> None:
    path = make_model.make_random_model(tmp_path, seed=1, tied=tied, layers=1)
    config = AutoConfig.from_pretrained(path)
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings == tied
    engine = TransformersEngine.from_pretrained(path)
    (group,) = engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=4), samples_per_prompt=2, seeds=[0])
    assert len(group) == 2


def test_warm_up_lowers_the_loss_and_reports(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = [
            "--out",
            str(tmp_path),
            "--layers",
            "1",
            "--max-steps",
            "12",
            "--batch-size",
            "8",
            "--threads",
            "1",
        ]
        assert make_model.main([*arguments, "--eval-problems", "8"]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "warmup.json").read_text())
    assert report["steps"] == 12
    assert report["losses"][-1] < report["losses"][0] - 1
    assert 0 <= report["accuracy"] <= 1
    assert TransformersEngine.from_pretrained(tmp_path).weights_version == 0


def test_bad_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_model.main(["--out", str(tmp_path), "--hidden", "100"]) == 2
    assert "hidden=100" in capsys.readouterr().err
