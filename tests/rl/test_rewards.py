r"""The two reward rules: which box counts, which spellings agree, and how the rules differ on real ground truths."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import re
import threading
import time
from pathlib import Path

import pytest

from megatron_oisd.errors import OISDError
from megatron_oisd.rl import rewards
from megatron_oisd.rl.data import load_prompts
from megatron_oisd.rl.rewards import exact_match, get_reward, last_boxed, math_verify, normalize_answer

DATA = Path(os.environ.get("OISD_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def box(answer: str) -> str:
    return f"So the answer is \\boxed{{{answer}}}."


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{\frac{1}{2}", "1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"open { and } shut } \boxed{3} {", "3"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_boxes_that_never_close_take_linear_time() -> None:
    start = time.perf_counter()
    assert last_boxed(r"\boxed{" * 100_000 + "1}") == "1"
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("  4 2 ", "42"),
        ("$42$", "42"),
        (r"\$42", "42"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"1\,000", "1000"),
        (r"11,\! 111,\! 111", "11111111"),
        ("1{,}000", "1000"),
        ("1,234,567.5", "1234567.5"),
        (r"\frac{1,000}{3}", r"\frac{1000}{3}"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"5 \text{ cm}", r"5\ \mathrm{cm}"),
        (r"\textbf{(\text{A})}", "(A)"),
        (r"\dfrac{9}{56}", r"\tfrac{9}{56}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{12}", r"\frac{1}{12}"),
        (r"\frac{1}2", r"\frac{1}{2}"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        ("x^{2}", "x^2"),
        (r"90^{\circ}", r"90^\circ"),
        ("42.", "42"),
        ("+3", "3"),
        (r"50\%", "50"),
        ("50%", "50"),
        ("{{7}}", "7"),
        ("{+7.}", "7"),
        ("−3", "-3"),  # noqa: RUF001
    ],
)
def test_spellings_that_agree(one: str, other: str) -> None:
    assert normalize_answer(one) == normalize_answer(other)
    assert exact_match(box(one), other) == 1.0
    assert exact_match(box(other), one) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(1,234)", "(1234)"),
        ("[1,234]", "1234"),
        (r"\{1,234\}", "1234"),
        ("3, 500", "3500"),
        ("1,23", "123"),
        ("0.5", r"\frac{1}{2}"),
        ("{1}+{2}", "1}+{2"),
        (r"\leftarrow", "arrow"),
        ("-3", "3"),
        ("5 cm", "5"),
        ("+", ""),
        ("x^{23}", "x^2 3 4"),
    ],
)
def test_spellings_that_differ(one: str, other: str) -> None:
    assert normalize_answer(one) != normalize_answer(other)


def test_a_row_break_is_not_a_spacing_command() -> None:
    matrix = r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
    assert normalize_answer(matrix) == r"\begin{pmatrix}1\\2\end{pmatrix}"


def test_exact_match_without_an_answer() -> None:
    assert exact_match("the answer is 2", "2") == 0.0
    assert exact_match(r"\boxed{2", "2") == 0.0
    assert exact_match(r"\boxed{ }", "2") == 0.0
    assert exact_match(r"\boxed{}", " ") == 0.0
    assert exact_match(r"\boxed{2}, no, \boxed{3}", "2") == 0.0


def test_registry() -> None:
    assert get_reward("exact_match") is exact_match
    with pytest.raises(OISDError, match=r"reward 'exact' is not known; choose one of exact_match, math_verify"):
        get_reward("exact")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else real(name))
    for call in (lambda: get_reward("math_verify"), lambda: math_verify(box("1"), "2")):
        with pytest.raises(OISDError, match=r"megatron_oisd\[rl\]"):
            call()


@needs_math_verify
def test_math_verify_accepts_equal_values() -> None:
    assert get_reward("math_verify") is math_verify
    for answer, truth in [("0.5", r"\frac{1}{2}"), ("7, 5, 3", "3, 5, 7"), ("x=5", "5"), (r"2\sqrt{3}", r"\sqrt{12}")]:
        assert math_verify(box(answer), truth) == 1.0
        assert exact_match(box(answer), truth) == 0.0
    for answer, truth in [("0.51", r"\frac{1}{2}"), ("No", "Yes"), ("3, 5", "3, 5, 7")]:
        assert math_verify(box(answer), truth) == 0.0
    assert math_verify("no box: 5", "5") == 0.0


@needs_math_verify
@pytest.mark.parametrize(
    "answer", ["", r"\frac{", "\x00", r"\left(", "\\" * 50, "{" * 8 + "}" * 8, "9" * 5000, "\ud800"]
)
def test_math_verify_scores_garbage_zero(answer: str) -> None:
    assert math_verify(box(answer), "12") == 0.0


@needs_math_verify
def test_math_verify_works_in_threads() -> None:
    # Unix signals, the package's own time limit, would raise here.
    pairs = [(f"{i}/8", f"{i / 8}") for i in range(1, 6)] + [(f"{i}/7", "0.9") for i in range(1, 6)]
    scores: dict[str, float] = {}

    def score(answer: str, truth: str) -> None:
        scores[answer] = math_verify(box(answer), truth)

    threads = [threading.Thread(target=score, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert scores == {answer: float(answer.endswith("/8")) for answer, _ in pairs}


@needs_math_verify
def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    math_verify(box("1/2"), "0.5")  # the worker runs
    monkeypatch.setattr(rewards, "_ANSWER_SECONDS", 0.5)
    start = time.monotonic()
    assert math_verify(box("9^{9^{9^{9}}}"), "1") == 0.0
    assert time.monotonic() - start < 5
    monkeypatch.undo()
    assert math_verify(box("3/4"), "0.75") == 1.0, "a new worker answers"


@needs_math_verify
def test_a_worker_that_was_killed_is_replaced() -> None:
    assert math_verify(box("1/4"), "0.25") == 1.0
    process = rewards._worker()._process
    assert process is not None
    process.kill()
    process.wait()
    assert math_verify(box("5/4"), "1.25") == 1.0


@pytest.fixture(scope="module")
def ground_truths() -> list[str]:
    if not DATA.is_dir():
        pytest.skip("the public problem sets are not here (OISD_DATA)")
    return sorted({record.ground_truth for path in DATA.glob("*.parquet") for record in load_prompts(path)})


def test_exact_match_on_real_ground_truths(ground_truths: list[str]) -> None:
    assert len(ground_truths) > 1500
    for truth in ground_truths:
        assert exact_match(box(truth), truth) == 1.0, truth
        assert exact_match(box(f" $ {truth} $. "), truth) == 1.0, truth
        once = normalize_answer(truth)
        assert normalize_answer(once) == once, truth
    # Distinct answers must stay distinct, but for spellings of the same one ("\dfrac" and "\frac", "50" and "50\%").
    merged = len(ground_truths) - len({normalize_answer(truth) for truth in ground_truths})
    assert merged < 0.05 * len(ground_truths)


@needs_math_verify
def test_the_two_rules_on_real_ground_truths(ground_truths: list[str]) -> None:
    r"""math_verify accepts all that exact_match does, and more; it disagrees with few wrong answers.

    What it does not prove: that either rule is right on free-form answers a model writes.
    """
    sample = random.Random(0).sample(ground_truths, 60)
    worker = rewards._worker()
    alone = sum(worker.ask(truth, truth) for truth in sample)
    assert alone >= 58, "computer algebra confirms nearly every answer against itself without the exact rule"
    for truth, other in itertools.pairwise(sample):
        assert math_verify(box(truth), truth) == 1.0
        if exact_match(box(other), truth):
            continue
        # Another problem's answer: equal only if it is the same value in another form.
        assert math_verify(box(other), truth) == 0.0, (truth, other)

    # "3/4" for "\\frac{3}{4}": the paper's rule calls it wrong, algebra does not.
    fractions = [re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", truth) for truth in ground_truths]
    slashed = [(f"{match[1]}/{match[2]}", match[0]) for match in fractions if match][:20]
    assert len(slashed) == 20
    for answer, truth in slashed:
        assert (exact_match(box(answer), truth), math_verify(box(answer), truth)) == (0.0, 1.0), (answer, truth)
