"""Time and memory of the logit-lens loss against other implementations: ``python -m benchmarks.losses``.

Rows go to ``benchmarks/results/losses-<device>.jsonl`` and, as Markdown tables, to stdout. ``--device fake`` gives the
peak memory of sizes that need not fit this machine, with blocks of the size that a GPU gets; ``--device fake-cpu`` with
those of a CPU, which takes a quarter of an hour. What is measured and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import contenders, harness
from benchmarks.contenders import Case
from megatron_oisd.losses import js_eager

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHORT = {dtype: name for name, dtype in _DTYPES.items()}

GRIDS: dict[str, dict[str, list[Case]]] = {
    "cpu": {
        "tiny": [Case(48, 500, 32, torch.float32)],
        "default": [
            Case(512, 32000, 512, torch.float32),
            Case(512, 32000, 512, torch.bfloat16),
            Case(256, 152064, 512, torch.float32),
        ],
        "large": [Case(256, 152064, 1024, torch.float32), Case(128, 152064, 2560, torch.float32)],
    },
    "cuda": {
        "tiny": [Case(48, 500, 32, torch.bfloat16, "cuda")],
        "default": [
            Case(8192, 32000, 4096, torch.bfloat16, "cuda"),
            Case(8192, 128256, 4096, torch.bfloat16, "cuda"),
            Case(8192, 152064, 2560, torch.bfloat16, "cuda"),
            Case(8192, 152064, 2560, torch.float32, "cuda"),
            Case(8192, 152064, 2560, torch.bfloat16, "cuda", head_gradient=False),
        ],
    },
}
GRIDS["fake"] = GRIDS["fake-cpu"] = {
    "tiny": [Case(48, 500, 32, torch.bfloat16)],
    "default": [
        Case(tokens, 152064, 2560, dtype, head_gradient=head_gradient)
        for dtype in (torch.bfloat16, torch.float32)
        for head_gradient in (True, False)
        for tokens in (1024, 4096, 8192)
    ],
}

# Their data-dependent indexing or compiled code does not run on fake tensors.
_NOT_FAKE = {name for name in contenders.NAMES if "top-" in name or "compile" in name}

_TIME_COLUMNS = {
    "contender": "contender", "N": "N", "V": "V", "h": "h", "dtype": "dtype", "fwd ms p50": "forward_ms_p50",
    "fwd+bwd ms p20": "total_ms_p20", "p50": "total_ms_p50", "p80": "total_ms_p80", "CPU ms p50": "total_cpu_ms_p50",
    "time / naive": "time_to_naive", "products / time": "roofline", "GFLOP": "gflop", "peak MiB": "peak_mib",
    "peak / naive": "peak_to_naive", "gradient error": "gradient_error", "note": "note",
}  # fmt: skip
_MEMORY_COLUMNS = {
    "contender": "contender", "N": "N", "V": "V", "h": "h", "dtype": "dtype", "head gradient": "head_gradient",
    "peak MiB": "peak_mib", "peak / naive": "peak_to_naive", "peak / Liger": "peak_to_liger", "note": "note",
}  # fmt: skip


def measure(case: Case, names: Iterable[str], *, repeats: int) -> list[dict[str, Any]]:
    """Rows of one case: agreement and peak memory of each contender first, then times, taking turns."""
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, harness.Step] = {}
    reference = _reference_gradient(case)
    for name in names:
        row = rows[name] = _row(case, name)
        try:
            contender = contenders.make_contender(name)
        except ImportError as error:
            row["note"] = f"not installed: {error}"
            continue
        inputs = contenders.make_inputs(case, teacher=contender.teacher, main_grad=contender.main_grad)
        try:
            contenders.run(contender, inputs)  # compiles, and touches memory for the first time
            row["peak_bytes"] = harness.peak_bytes(lambda c=contender, x=inputs: _and_drop(c, x), device=case.device)
            loss = contenders.run(contender, inputs)
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        row["loss"] = loss.item()
        if contender.exact and inputs.student.grad is not None:
            row["gradient_error"] = _relative(inputs.student.grad, reference)
        row |= _counts(case, contender.products)
        inputs.student.grad = inputs.head.grad = None
        steps[name] = lambda between, c=contender, x=inputs: contenders.run(c, x, between)  # type: ignore[misc]
    shared = contenders.make_inputs(case)
    for products in (4, 3):
        steps[f"{products} products"] = contenders.products_step(shared, products)
    times = harness.time_interleaved(steps, device=case.device, repeats=repeats)
    for name, measured in times.items():
        rows.setdefault(name, _row(case, name) | _counts(case, int(name[0]) if name[0].isdigit() else 4))
        for key in ("forward", "total", "total_cpu"):
            timing = getattr(measured, key)
            rows[name] |= {f"{key}_ms_p{p}": 1e3 * getattr(timing, f"p{p}") for p in (20, 50, 80)}
    _add_ratios(list(rows.values()), clock="total_ms_p50" if case.device == "cuda" else "total_cpu_ms_p50")
    return list(rows.values())


def measure_fake(case: Case, names: Iterable[str], *, blocks: str) -> list[dict[str, Any]]:
    """Peak memory of one case on fake tensors, with the block size of the eager kernels on ``blocks``."""
    rows = []
    for name in names:
        if name in _NOT_FAKE:
            continue
        row = _row(case, name)
        try:
            contender = contenders.make_contender(name)
        except ImportError as error:
            rows.append(row | {"note": f"not installed: {error}"})
            continue

        def make(contender: contenders.Contender = contender) -> Any:
            inputs = contenders.make_inputs(case, teacher=contender.teacher, main_grad=contender.main_grad)
            return lambda: contenders.run(contender, inputs), inputs.tensors()

        with (
            mock.patch.dict(js_eager._BLOCK_ELEMENTS, {"cpu": js_eager._BLOCK_ELEMENTS[blocks]}),
            # No weight is 0, which tensors without data cannot tell.
            mock.patch.object(torch.Tensor, "nonzero", lambda weights: torch.arange(len(weights)).unsqueeze(1)),
        ):
            row["peak_bytes"] = harness.fake_peak(make)
        rows.append(row)
    _add_ratios(rows, clock="")
    return rows


def _row(case: Case, name: str) -> dict[str, Any]:
    return {
        "contender": name, "N": case.tokens, "V": case.vocabulary, "h": case.hidden, "dtype": _SHORT[case.dtype],
        "device": case.device, "head_gradient": case.head_gradient,
    }  # fmt: skip


def _counts(case: Case, products: int) -> dict[str, Any]:
    """Operations of the products; bytes that inputs and results take, and those of one pair of logits."""
    used = products - (not case.head_gradient)
    element = case.dtype.itemsize
    tokens, head = case.tokens * case.hidden, case.vocabulary * case.hidden
    return {
        "products": used,
        "gflop": used * case.product_flops / 1e9,
        "bytes_in_out": element * (3 * tokens + head * (2 if case.head_gradient else 1)),
        "bytes_logits": 2 * element * case.tokens * case.vocabulary,
    }


def _reference_gradient(case: Case) -> torch.Tensor:
    """The hidden gradient of the naive loss on the same inputs in fp32."""
    inputs = contenders.make_inputs(case)
    wide = replace(inputs, student=inputs.student.detach().float().requires_grad_())
    wide.teacher, wide.head = wide.teacher.float(), wide.head.detach().float()
    contenders.run(contenders.make_contender("naive fp32"), wide)
    assert wide.student.grad is not None
    return wide.student.grad


def _relative(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    return ((gradient.float() - reference).norm() / reference.norm()).item()


def _and_drop(contender: contenders.Contender, inputs: contenders.Inputs) -> None:
    contenders.run(contender, inputs)
    inputs.student.grad = inputs.head.grad = None


def _add_ratios(rows: list[dict[str, Any]], *, clock: str) -> None:
    by_name = {row["contender"]: row for row in rows}
    naive, liger = by_name.get("naive fp32", {}), by_name.get("Liger, eager", {})
    for row in rows:
        if "peak_bytes" in row:
            row["peak_mib"] = row["peak_bytes"] / 2**20
            for other, key in ((naive, "peak_to_naive"), (liger, "peak_to_liger")):
                if "peak_bytes" in other:
                    row[key] = row["peak_bytes"] / other["peak_bytes"]
        if clock in row:
            if clock in naive:
                row["time_to_naive"] = row[clock] / naive[clock]
            roof = by_name.get(f"{4 if row['products'] + (not row['head_gradient']) == 4 else 3} products", {})
            if clock in roof:
                row["roofline"] = roof[clock] / row[clock]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(GRIDS), action="append", help="default: cpu, fake, cuda where it is")
    parser.add_argument("--grid", choices=("tiny", "default", "large"), default="default", help="large: CPU only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contender", choices=contenders.NAMES, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    names = options.contender or contenders.NAMES
    devices = options.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else []), "fake"]
    for device in devices:
        record = harness.environment(device)
        rows: list[dict[str, Any]] = []
        for case in GRIDS[device].get(options.grid, []):
            if device.startswith("fake"):
                rows += measure_fake(case, names, blocks="cpu" if device == "fake-cpu" else "cuda")
            else:
                rows += measure(case, names, repeats=options.repeats)
            gc.collect()
            harness.write_rows(options.out / f"losses-{device}.jsonl", record, rows)
        print(f"\n## losses on {device}: {record}\n")
        print(harness.markdown(rows, _MEMORY_COLUMNS if device.startswith("fake") else _TIME_COLUMNS), flush=True)


if __name__ == "__main__":
    main()
