"""What a top-k teacher loses: ``python -m benchmarks.topk_error``.

Rows go to ``benchmarks/results/topk-error.jsonl``. Distributions are made, not taken from a model: teacher logits are
Gaussian with a standard deviation, or fall with the logarithm of the rank (Zipf) with Gaussian noise of 1 on top; the
student's logits are the teacher's plus independent Gaussian noise of 1. float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from megatron_oisd.losses.js import vocab_parallel_js
from megatron_oisd.losses.js_topk import make_topk_teacher, topk_rows_

_KINDS = {
    "Gaussian, std 2": lambda noise: 2.0 * noise,
    "Gaussian, std 4": lambda noise: 4.0 * noise,
    "Gaussian, std 6": lambda noise: 6.0 * noise,
    "Zipf, exponent 1": lambda noise: noise - 1.0 * torch.arange(1, noise.shape[1] + 1).log(),
    "Zipf, exponent 1.5": lambda noise: noise - 1.5 * torch.arange(1, noise.shape[1] + 1).log(),
    "Zipf, exponent 2": lambda noise: noise - 2.0 * torch.arange(1, noise.shape[1] + 1).log(),
}
_COLUMNS = {
    "teacher": "teacher", "k": "k", "teacher's tail": "teacher_tail", "student's tail": "student_tail", "JS": "js",
    "lost / JS": "lost", "bound / JS": "bound", "gradient error": "gradient_error",
}  # fmt: skip


def measure(tokens: int, vocabulary: int, ks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows: means over tokens."""
    rows = []
    for kind, make in _KINDS.items():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, tokens, vocabulary, generator=generator, dtype=torch.float64)
        teacher = make(noise[0])
        student = (teacher + noise[1]).requires_grad_()
        exact = vocab_parallel_js(student, teacher)
        (gradient,) = torch.autograd.grad(exact.sum(), student)
        rows += [_row(kind, k, student.detach(), teacher, exact.detach(), gradient) for k in ks]
    return rows


def _row(kind: str, k: int, student: Tensor, teacher: Tensor, exact: Tensor, exact_gradient: Tensor) -> dict[str, Any]:
    chosen = make_topk_teacher(teacher, k, temperature=1.0)
    gradient = student.clone()
    values = topk_rows_(
        gradient, chosen, torch.ones_like(exact), columns=student.shape[1], temperature=1.0, group=None, first_token=0
    )
    tails = [1 - torch.softmax(logits, -1).gather(-1, chosen.token_ids).sum(-1) for logits in (teacher, student)]
    mass = (tails[0] + tails[1]) / 2
    return {
        "teacher": kind, "k": k, "N": len(exact), "V": student.shape[1], "teacher_tail": tails[0].mean().item(),
        "student_tail": tails[1].mean().item(), "js": exact.mean().item(),
        "lost": ((exact - values).sum() / exact.sum()).item(),
        "bound": (torch.log(torch.tensor(2.0)) * mass.sum() / exact.sum()).item(),
        "gradient_error": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topk_error", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--k", type=int, action="append", help="default: 16 64 256 1024")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    rows = measure(options.tokens, options.vocabulary, tuple(options.k or (16, 64, 256, 1024)))
    harness.write_rows(options.out / "topk-error.jsonl", harness.environment("cpu"), rows)
    print(harness.markdown(rows, _COLUMNS))


if __name__ == "__main__":
    main()
