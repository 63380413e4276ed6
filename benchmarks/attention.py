"""The attention loss against one transformer layer: ``python -m benchmarks.attention``.

The layer is Hugging Face's Qwen3 decoder layer with the sizes of Qwen3-4B, one sequence, forward and backward. The loss
is what the pipeline adds: on the student's stage :func:`attention_alignment` (values and both gradients), on the last
stage :func:`teacher_log_probs`. Rows go to ``benchmarks/results/attention-<device>.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from megatron_oisd.config import OISDConfig
from megatron_oisd.losses.attention import attention_alignment, sample_keys, teacher_log_probs


@dataclass(frozen=True)
class Layer:
    """Sizes of a decoder layer; the defaults are Qwen3-4B's."""

    hidden: int = 2560
    ffn: int = 9728
    query_heads: int = 32
    key_heads: int = 8
    head_dim: int = 128

    def flops(self, length: int) -> float:
        """Of forward and backward, backward counted as twice forward, causal attention as half of the square."""
        attention = self.hidden * self.head_dim * (2 * self.query_heads + 2 * self.key_heads)
        products = 2 * length * (attention + 3 * self.hidden * self.ffn)
        return 3.0 * (products + 2 * length**2 * self.query_heads * self.head_dim)

    def alignment_flops(self, queries: int, keys: int) -> float:
        """Teacher's scores, student's scores, gradients of queries and keys."""
        return 4.0 * 2 * queries * keys * self.query_heads * self.head_dim


SIZES = {"qwen3-4b": Layer(), "tiny": Layer(32, 64, 4, 2, 8)}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_COLUMNS = {
    "s": "s", "dtype": "dtype", "what": "what", "ms p20": "total_ms_p20", "p50": "total_ms_p50", "p80": "total_ms_p80",
    "CPU ms p50": "total_cpu_ms_p50", "% of layer": "percent", "GFLOP": "gflop", "% of layer's FLOP": "flop_percent",
}  # fmt: skip


def measure(
    layer: Layer, length: int, dtype: torch.dtype, device: str, *, repeats: int, settings: OISDConfig
) -> list[dict[str, Any]]:
    """Rows of one length."""
    mask = torch.ones(1, length, dtype=torch.bool)
    chosen = torch.zeros_like(mask)
    queries = min(settings.attn_queries, length)
    chosen[0, torch.randperm(length, generator=torch.Generator().manual_seed(0))[:queries]] = True
    sample = sample_keys(chosen, window=settings.attn_window, num_global=settings.attn_global_keys)
    sample = sample.to(torch.device(device))
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    query, teacher_query = torch.randn(2, length, 1, layer.query_heads, layer.head_dim, **options)
    key, teacher_key = torch.randn(2, length, 1, layer.key_heads, layer.head_dim, **options)
    coefficients = torch.full((queries,), 1.0 / queries, device=device)
    scale = layer.head_dim**-0.5

    def teacher(between: Callable[[], None] = lambda: None) -> torch.Tensor:
        return teacher_log_probs(teacher_query, teacher_key, sample, scale=scale)

    log_probs = teacher()

    def student(between: Callable[[], None]) -> None:
        attention_alignment(query, key, log_probs, sample, coefficients, scale=scale, num_heads_total=layer.query_heads)

    steps = {"layer": _layer_step(layer, length, options), "student": student, "teacher": teacher}
    times = harness.time_interleaved(steps, device=device, repeats=repeats, warmup=1)
    return _rows(layer, length, dtype, times, queries, sample.keys.shape[1], "cpu" if device == "cpu" else "wall")


def _rows(
    layer: Layer, length: int, dtype: torch.dtype, times: Any, queries: int, keys: int, clock: str
) -> list[dict[str, Any]]:
    name = next(name for name, value in _DTYPES.items() if value is dtype)
    rows = [
        {"s": length, "dtype": name, "what": what}
        | {f"total_ms_p{p}": 1e3 * getattr(measured.total, f"p{p}") for p in (20, 50, 80)}
        | {"total_cpu_ms_p50": 1e3 * measured.total_cpu.p50}
        for what, measured in times.items()
    ]
    key = "total_cpu_ms_p50" if clock == "cpu" else "total_ms_p50"
    both = {"s": length, "dtype": name, "what": "student + teacher"}
    both |= {k: rows[1][k] + rows[2][k] for k in rows[1] if k.startswith("total_")}
    rows.append(both)
    for row in rows[1:]:
        row["percent"] = 100 * row[key] / rows[0][key]
    rows[0]["gflop"] = layer.flops(length) / 1e9
    both["gflop"] = layer.alignment_flops(queries, keys) / 1e9
    both["flop_percent"] = 100 * both["gflop"] / rows[0]["gflop"]
    return rows


def _layer_step(layer: Layer, length: int, options: dict[str, Any]) -> harness.Step:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=layer.hidden, intermediate_size=layer.ffn, num_attention_heads=layer.query_heads,
        num_key_value_heads=layer.key_heads, head_dim=layer.head_dim, num_hidden_layers=1, vocab_size=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    module = Qwen3DecoderLayer(config, 0).to(**options)
    hidden = torch.randn(1, length, layer.hidden, **options).requires_grad_()
    positions = torch.arange(length, device=options["device"]).unsqueeze(0)
    rotary = Qwen3RotaryEmbedding(config).to(options["device"])(hidden.detach(), positions)

    def step(between: Callable[[], None]) -> None:
        module.zero_grad(set_to_none=True)
        hidden.grad = None
        output = module(hidden, position_embeddings=rotary)
        output = output[0] if isinstance(output, tuple) else output
        between()
        output.backward(torch.ones_like(output))

    return step


def counted(layer: Layer, length: int, settings: OISDConfig) -> dict[str, Any]:
    """A row of operations only, for a length that was not run."""
    keys = settings.attn_window + settings.attn_global_keys
    gflop = layer.alignment_flops(settings.attn_queries, keys) / 1e9
    whole = layer.flops(length) / 1e9
    return {"s": length, "what": "student + teacher, counted", "gflop": gflop, "flop_percent": 100 * gflop / whole}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="qwen3-4b")
    parser.add_argument("--length", type=int, action="append", help="default: CPU 1024 2048, GPU 2048 4096 8192")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bf16" if cuda else "fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    device, layer, settings = "cuda" if cuda else "cpu", SIZES[options.size], OISDConfig(layers=(1,))
    record = harness.environment(device)
    rows: list[dict[str, Any]] = []
    for length in options.length or ((2048, 4096, 8192) if cuda else (1024, 2048)):
        rows += measure(
            layer, length, _DTYPES[options.dtype], device, repeats=options.repeats, settings=settings
        )  # fmt: skip
        harness.write_rows(options.out / f"attention-{device}.jsonl", record, [*rows, counted(layer, 8192, settings)])
    rows.append(counted(layer, 8192, settings))
    print(harness.markdown(rows, _COLUMNS))


if __name__ == "__main__":
    main()
