"""The quickstart's task: two-step arithmetic told as a short story, made on the spot from a seed.

``python examples/quickstart/arithmetic.py --out data`` writes ``train.jsonl`` and ``heldout.jsonl``. Which split a
problem belongs to follows from its expression alone, so the splits share no expression, whatever the seeds and sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oisd.errors import OISDError, command_line

Split = Literal["train", "heldout"]

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
DATA_SOURCE = "quickstart_arithmetic"
LARGEST = 20
_HELDOUT_SHARE = 8  # one expression in eight is held out

_NAMES = ("Ada", "Ben", "Dan", "Eva", "Finn", "Ivy", "Kim", "Leo")
_OBJECTS = ("books", "cards", "coins", "eggs", "keys", "nuts", "pens", "toys")
_TEMPLATES = {
    "add_add": (
        "{name} has {a} {things}, finds {b} and then {c}. How many now?",
        "{name} buys {a} {things}, then {b} and then {c}. How many in all?",
    ),
    "add_sub": (
        "{name} has {a} {things}, finds {b} and loses {c}. How many now?",
        "A box has {a} {things}. {name} puts in {b} and takes {c}. How many now?",
    ),
    "sub_add": (
        "{name} has {a} {things}, loses {b} and finds {c}. How many now?",
        "A box has {a} {things}. {name} takes {b} and puts in {c}. How many now?",
    ),
    "mul_add": (
        "{name} has {a} bags of {b} {things} and finds {c}. How many now?",
        "{a} boxes of {b} {things} and {c} more. How many has {name} in all?",
    ),
}
_SIGNS = {"add_add": "++", "add_sub": "+-", "sub_add": "-+", "mul_add": "*+"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: the question, the expression it asks for (``12+30-5``) and the value halfway and at the end."""

    question: str
    expression: str
    halfway: int
    answer: int

    @property
    def worked_solution(self) -> str:
        """Both steps written out, then the boxed answer."""
        last = max(self.expression.rfind("+"), self.expression.rfind("-"))
        first, rest = self.expression[:last], self.expression[last:]
        return f"{first}={self.halfway}, {self.halfway}{rest}={self.answer}. \\boxed{{{self.answer}}}"

    @property
    def short_solution(self) -> str:
        """The boxed answer alone."""
        return f"\\boxed{{{self.answer}}}"

    def messages(self, system_prompt: str | None = None) -> list[dict[str, str]]:
        """Give the chat that asks the question, with a system message only where a system prompt is given."""
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return [*system, {"role": "user", "content": self.question}]


def split_of(expression: str) -> Split:
    """Name the split that owns an expression: a fixed hash of its text, independent of every seed."""
    return "heldout" if hashlib.sha256(expression.encode()).digest()[0] % _HELDOUT_SHARE == 0 else "train"


def problem_stream(split: Split, *, seed: int, largest: int = LARGEST) -> Iterator[Problem]:
    """Draw problems of one split for ever; they repeat in time.

    Args:
        split: ``"train"`` or ``"heldout"``.
        seed: the same seed gives the same problems.
        largest: the largest number in a story; factors stay within 2..5.
    """
    if largest < 2:
        raise OISDError(f"largest={largest}: stories need numbers of at least 2; pass --largest 2 or more")
    rng = random.Random(f"{split}-{seed}-{largest}")
    while True:
        kind = rng.choice(tuple(_TEMPLATES))
        a, b, c = (rng.randint(1, largest) for _ in range(3))
        if kind == "mul_add":
            a, b = rng.randint(2, 5), rng.randint(2, 5)
        first, second = _SIGNS[kind]
        expression = f"{a}{first}{b}{second}{c}"
        halfway = {"+": a + b, "-": a - b, "*": a * b}[first]
        answer = halfway + c if second == "+" else halfway - c
        if min(halfway, answer) < 0 or split_of(expression) != split:
            continue
        template = rng.choice(_TEMPLATES[kind])
        question = template.format(name=rng.choice(_NAMES), things=rng.choice(_OBJECTS), a=a, b=b, c=c)
        yield Problem(question=question, expression=expression, halfway=halfway, answer=answer)


def make_problems(split: Split, count: int, *, seed: int, largest: int = LARGEST) -> list[Problem]:
    """Draw ``count`` problems of one split, no two with the same expression.

    Raises:
        OISDError: the split holds too few expressions for ``count``.
    """
    found: dict[str, Problem] = {}
    tries = 20 * count + 2_000
    for problem, _ in zip(problem_stream(split, seed=seed, largest=largest), range(tries), strict=False):
        if len(found) >= count:
            break
        found.setdefault(problem.expression, problem)
    if len(found) < count:
        raise OISDError(
            f"{count} {split} problems asked for, numbers up to {largest} gave {len(found)} different ones; "
            "ask for fewer or raise --largest"
        )
    return list(found.values())


def record(problem: Problem, identifier: str, system_prompt: str | None = None) -> dict[str, Any]:
    """Give one line of the RL data set: ``id``, ``messages``, ``ground_truth`` (a string) and ``data_source``."""
    return {
        "id": identifier,
        "messages": problem.messages(system_prompt),
        "ground_truth": str(problem.answer),
        "data_source": DATA_SOURCE,
    }


def write_split(
    path: Path, split: Split, count: int, *, seed: int, largest: int = LARGEST, system_prompt: str | None = None
) -> None:
    """Write ``count`` problems of one split as JSON lines."""
    problems = make_problems(split, count, seed=seed, largest=largest)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, problem in enumerate(problems):
            file.write(json.dumps(record(problem, f"{split}-{index:05d}", system_prompt)) + "\n")


@command_line
def main(argv: list[str] | None = None) -> int | None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description="Generate the quickstart's arithmetic problems.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--train", type=int, default=4096, help="number of training problems (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=256, help="number of held-out problems (default: %(default)s)")
    parser.add_argument("--largest", type=int, default=LARGEST, help="largest number in a story (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--system-prompt", action="store_true", help="put the paper's system prompt before each problem"
    )
    args = parser.parse_args(argv)
    system_prompt = SYSTEM_PROMPT if args.system_prompt else None
    sizes: dict[Split, int] = {"train": args.train, "heldout": args.heldout}
    for split, count in sizes.items():
        path = args.out / f"{split}.jsonl"
        write_split(path, split, count, seed=args.seed, largest=args.largest, system_prompt=system_prompt)
        print(f"wrote {count} problems to {path}")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
