r"""Rewards: 1 for a right final answer, 0 otherwise. The answer is what the last ``\boxed{...}`` holds.

``exact_match`` is the rule of the OISD paper (exact match of the normalised answer): two answers agree when they are
the same expression up to spelling that typesets alike. ``math_verify`` also accepts what
the math-verify package can prove equal (``1/2`` and ``0.5``). Computer algebra can run for ever on an answer such as
``9^{9^{9^{9}}}``, and the package's own timeouts are Unix signals that work in the main thread only; so it runs in a
worker process that is killed and replaced when it overruns. Rewards may therefore be called from any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_oisd.errors import OISDError

RewardFn = Callable[[str, str], float]

_BOX_TOKENS = re.compile(r"\\+boxed\s*(\{)|\\.|[{}]", re.DOTALL)
# (?<!\\): in "\\ " and "\\," (a matrix row break) the second backslash starts no spacing command.
_SPACING = re.compile(r"(?<!\\)\\(?:!\s*|[,;:> ]|quad\b|qquad\b|thinspace\b)|~")
_SIZING = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_BARE_ARGUMENT = re.compile(r"(\\frac|\\sqrt)\s*([0-9a-zA-Z])")
_BARE_DENOMINATOR = re.compile(r"(\\frac\{[^{}]*\})\s*([0-9a-zA-Z])")
_SHORT_SCRIPT = re.compile(r"([\^_])\{([0-9a-zA-Z]|\\[a-zA-Z]+)\}")
_UNICODE = str.maketrans({"−": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " "})  # noqa: RUF001


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last balanced ``\boxed{...}``, or None; one pass, linear in the length of ``text``.

    A box that is never closed (a truncated response) is skipped; of nested boxes the innermost last one counts; the
    escaped braces ``\{`` and ``\}`` are not grouping.
    """
    open_groups: list[tuple[bool, int]] = []
    best: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token.group(1):
            open_groups.append((True, token.end()))
        elif token.group() == "{":
            open_groups.append((False, token.end()))
        elif token.group() == "}" and open_groups:
            is_box, start = open_groups.pop()
            if is_box and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


def normalize_answer(answer: str) -> str:
    r"""Rewrite an answer to one spelling. Never raises.

    Removed: whitespace and spacing commands, ``$``, ``\left`` and ``\right``, percent signs, thousands commas (not
    where brackets make them separators, as in ``(1,234)``), a leading ``+``, a trailing period, braces around the
    whole. Rewritten: ``\dfrac`` and ``\tfrac`` to ``\frac``; ``\text{x}``, ``\mathrm{x}`` to ``x`` (a unit stays);
    what TeX typesets alike to one form (``\frac12`` to ``\frac{1}{2}``, ``x^{2}`` to ``x^2``).
    """
    text = answer.translate(_UNICODE).replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "")
    text = _SPACING.sub("", text).replace("{,}", ",")
    text = _SIZING.sub("", text)
    text = _to_fixpoint(text, lambda value: _TEXT.sub(r"\1", value))
    text = _FRACTION.sub(r"\\frac", text)
    if not re.search(r"[(\[]|\\\{", text):
        # Before whitespace goes: "3, 500" is a list, "3,500" a number.
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    text = _BARE_ARGUMENT.sub(r"\1{\2}", text)
    text = _BARE_DENOMINATOR.sub(r"\1{\2}", text)
    text = "".join(text.split())
    text = _SHORT_SCRIPT.sub(r"\1\2", text)
    return _to_fixpoint(text, _peel)


def exact_match(response_text: str, ground_truth: str) -> float:
    r"""Return 1.0 iff the last balanced ``\boxed{...}`` equals the ground truth, both normalised; 0.0 without a box."""
    answer = last_boxed(response_text)
    if answer is None:
        return 0.0
    normalized = normalize_answer(answer)
    return float(normalized != "" and normalized == normalize_answer(ground_truth))


def math_verify(response_text: str, ground_truth: str) -> float:
    r"""Return 1.0 iff the last ``\boxed{...}`` matches exactly or math-verify proves it equal to the ground truth.

    Needs the ``rl`` extra. Garbage, an answer over 1,000 characters and one that computer algebra cannot settle
    within its time (20 s in all) score 0.0. Verdicts are remembered, as the rollouts of one group repeat answers.

    Raises:
        OISDError: math-verify is not installed or does not import.
    """
    _require_math_verify()
    answer = last_boxed(response_text)
    if answer is None or not answer.strip():
        return 0.0
    if exact_match(response_text, ground_truth):
        return 1.0
    if len(answer) > 1000:
        return 0.0
    return float(_proved_equal(answer, ground_truth))


REWARDS: dict[str, RewardFn] = {"exact_match": exact_match, "math_verify": math_verify}


def get_reward(name: str) -> RewardFn:
    """Return the reward called ``name``.

    Raises:
        OISDError: no such reward, or the package it needs is missing (found here, before any rollout is made).
    """
    if name not in REWARDS:
        raise OISDError(f"reward {name!r} is not known; choose one of {', '.join(sorted(REWARDS))}")
    if REWARDS[name] is math_verify:
        _require_math_verify()
    return REWARDS[name]


def _to_fixpoint(text: str, rewrite: Callable[[str], str]) -> str:
    while (rewritten := rewrite(text)) != text:
        text = rewritten
    return text


def _peel(text: str) -> str:
    """Take one leading plus, trailing period or pair of braces around the whole off."""
    if text.endswith(".") and len(text) > 1:
        return text[:-1]
    if text.startswith("+") and len(text) > 1:
        return text[1:]
    if text.startswith("{") and text.endswith("}") and _closes_at(text) == len(text) - 1:
        return text[1:-1]
    return text


def _closes_at(text: str) -> int | None:
    """Return where the brace that opens at 0 closes."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return token.start()
    return None


# ---- math-verify in a worker process ----------------------------------------------------------------------------

_STARTUP_SECONDS = 120.0
_ANSWER_SECONDS = 20.0
_WORKER_MEMORY_BYTES = 4 * 2**30


def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise OISDError("reward 'math_verify' needs the math-verify package; pip install 'megatron_oisd[rl]'")


@functools.lru_cache(maxsize=65536)
def _proved_equal(answer: str, ground_truth: str) -> bool:
    return _worker().ask(answer, ground_truth)


@functools.cache
def _worker_of(process_id: int) -> _MathWorker:
    worker = _MathWorker()
    atexit.register(worker.stop)
    return worker


def _worker() -> _MathWorker:
    # By process: a forked child must not share its parent's pipes.
    return _worker_of(os.getpid())


class _MathWorker:
    """One process that answers ``[answer, ground truth]`` lines; started when first asked, replaced when it hangs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answer: str, ground_truth: str) -> bool:
        """Return the worker's verdict; False when it overran or died over this question."""
        with self._lock:
            question = json.dumps([answer, ground_truth]).encode() + b"\n"
            if not self._send(question):
                self._start()
                self._send(question)
            reply = self._read_line(_ANSWER_SECONDS)
            if reply is None:
                self.stop()
            return reply == b"1"

    def _send(self, question: bytes) -> bool:
        if self._process is None or self._process.stdin is None:
            return False
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
        except OSError:  # it died since the last question
            return False
        return True

    def stop(self) -> None:
        """End the worker; the next question starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _start(self) -> None:
        self.stop()
        root = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_oisd.rl.rewards"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the trainer; the worker ends when its input closes
        )
        greeting = self._read_line(_STARTUP_SECONDS)
        if greeting != b"ready":
            self.stop()
            reason = greeting.decode(errors="replace") if greeting else "its worker process does not start"
            raise OISDError(f"reward 'math_verify' cannot run: {reason}; pip install 'megatron_oisd[rl]'")

    def _read_line(self, seconds: float) -> bytes | None:
        """Return one line without its end; None when the time is up or the worker has died."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(descriptor, 4096) if ready else b""
            if not chunk:
                return None
            line += chunk
        return line[:-1]


def _serve() -> None:
    """Answer on standard output until standard input closes: 1 where math-verify proves the pair equal, else 0."""
    import resource

    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the libraries print must not enter the replies
    # A runaway power tower should fail with MemoryError here, not take the trainer's node down.
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY_BYTES, _WORKER_MEMORY_BYTES))

    def reply(text: str) -> None:
        replies.write(" ".join(text.split()).encode() + b"\n")
        replies.flush()

    try:
        from math_verify import parse, verify
    except Exception as error:  # also what its own dependencies raise
        reply(f"math-verify does not import ({error})")
        return
    reply("ready")
    for line in sys.stdin.buffer:
        answer, ground_truth = json.loads(line)
        try:
            gold, target = (parse(f"\\boxed{{{text}}}") for text in (ground_truth, answer))
            equal = bool(gold) and bool(target) and bool(verify(gold, target))
        except Exception:  # garbage in, wrong answer out
            equal = False
        reply("1" if equal else "0")


if __name__ == "__main__":
    _serve()
