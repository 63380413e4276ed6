"""The teacher's way between stages: bytes and time against broadcasting distributions, waiting in a real pipeline.

``python -m benchmarks.transport``; rows go to ``benchmarks/results/transport-cpu.jsonl``. Two parts:

* *messages*: what one tensor-parallel rank sends for one microbatch at a real model's size, by payload, over gloo
  between two processes of this machine, beside broadcasting its shard of the fp32 distribution, which is what a user
  without this package would write. Bytes are those of the channel's own counter.
* *waiting*: updates of a small model on PP 4 with 1F1B, student on each stage in turn: seconds that the student's
  backward waits for its teacher, beside the step's.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks import harness
from benchmarks.updates import Shape, Updates
from megatron_oisd.config import OISDConfig
from megatron_oisd.losses.attention import QuerySample
from megatron_oisd.pipeline.channel import Channel, Part
from megatron_oisd.pipeline.exchange import TeacherExchange
from megatron_oisd.pipeline.placement import Source
from tests.helpers.ranks import run_ranks

PAYLOADS = ("hidden", "logits", "topk")
_MESSAGES = {
    "payload": "payload", "tokens": "tokens", "V": "V", "h": "h", "TP": "tp", "bytes by rank": "bytes",
    "bytes / broadcast": "bytes_ratio", "ms p50": "p50_ms", "time / broadcast": "time_ratio",
}  # fmt: skip
_WAITING = {
    "student's stage": "stage", "microbatches": "microbatches", "step ms p50": "step_ms", "wait ms p50": "wait_ms",
    "wait / step": "wait_ratio", "GRPO step ms p50": "grpo_ms", "teacher bytes": "teacher_bytes", "buffers": "buffers",
}  # fmt: skip


class _OneOf:
    """A tensor-parallel group as seen by its first rank: only sizes are asked of it."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def message_parts(payload: str, *, tokens: int, vocabulary: int, hidden: int, heads: int, tp: int) -> list[Part]:
    """What the first tensor-parallel rank sends for a microbatch of ``tokens`` response tokens, in bf16."""
    config = OISDConfig(layers=(1,), teacher_payload=payload)
    model = SimpleNamespace(num_attention_heads=heads, hidden_size=hidden, params_dtype=torch.bfloat16)
    share = -(-tokens // tp)
    queries, keys = min(config.attn_queries, tokens), config.attn_window + config.attn_global_keys
    entry: Any = SimpleNamespace(
        tokens=torch.empty(tokens), share=lambda rank: slice(rank * share, min((rank + 1) * share, tokens)),
        sample=QuerySample(*(torch.empty(queries, keys),) * 4),
    )  # fmt: skip
    group: Any = _OneOf(tp)
    exchange = TeacherExchange(
        config, model, vocab_columns=vocabulary // tp, tp_group=group, sources=[Source(("attn", "think"), 1, 0)],
        channels={}, stage=1, has_student=False,
    )  # fmt: skip
    return [part for kind in ("attn", "think") for part in exchange._parts(entry, kind)]


def _messages(sizes: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """Called on two ranks: rank 1 sends, rank 0 receives."""
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), []
    shard = torch.ones(sizes["tokens"], sizes["vocabulary"] // sizes["tp"])
    for payload in (*PAYLOADS, "broadcast"):
        parts = [] if payload == "broadcast" else message_parts(payload, **sizes)
        tensors = [torch.ones(part.shape, dtype=part.dtype) for part in parts]
        channel = Channel(dist.group.WORLD, source=1, target=0, device=torch.device("cpu"), limit=1)
        taken = []
        for index in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            if payload == "broadcast":
                dist.broadcast(shard, src=1)
            elif rank == 1:
                channel.send(index, tensors)
                channel.finish()
            else:
                channel.expect(index, parts)
                channel.receive(index)
                channel.forget(index)
            taken.append(time.perf_counter() - start)
        sent = shard.nbytes if payload == "broadcast" else channel.traffic.teacher_bytes // repeats
        results.append({"payload": payload, "bytes": sent, "p50_ms": 1000 * harness.Timing.of(taken).p50})
    dist.destroy_process_group()
    return results


def measure_messages(sizes: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """Rows: bytes as sent, time as received."""
    received, sent = run_ranks(2, _messages, sizes, repeats)
    rows = []
    for there, here in zip(sent, received, strict=True):
        rows.append(
            {
                "part": "messages", "payload": there["payload"], "tokens": sizes["tokens"], "V": sizes["vocabulary"],
                "h": sizes["hidden"], "tp": sizes["tp"], "bytes": there["bytes"], "p50_ms": here["p50_ms"],
                "bytes_ratio": there["bytes"] / sent[-1]["bytes"],
                "time_ratio": here["p50_ms"] / received[-1]["p50_ms"],
            }
        )  # fmt: skip
    return rows


def _waiting(shape: Shape, layer: int, steps: int) -> dict[str, Any]:
    """Called on every rank of the pipeline."""
    with Updates(shape, pp=4) as updates:
        updates.attach(OISDConfig(layers=(layer,), attn_queries=32))
        taken: dict[str, list[float]] = {"step": [], "wait": [], "grpo": []}
        metrics: dict[str, float] = {}
        for number in range(steps + 1):
            grpo, step = updates.timed(oisd=False), updates.timed(oisd=True)
            metrics = updates.oisd.metrics()
            if number:  # the first warms up
                taken["grpo"].append(grpo)
                taken["step"].append(step)
                taken["wait"].append(metrics["timing_s/oisd_wait"])
        return {
            "stage": updates.oisd._placement.stage_of[layer], "wait_ratio": sum(taken["wait"]) / sum(taken["step"]),
            **{f"{name}_ms": 1000 * harness.Timing.of(values).p50 for name, values in taken.items()},
            "teacher_bytes": metrics["oisd/transport/teacher_bytes"], "buffers": metrics["oisd/transport/buffers"],
        }  # fmt: skip


def measure_waiting(shape: Shape, steps: int) -> list[dict[str, Any]]:
    """Rows: one for each stage that the student may be on."""
    rows = []
    first_layers = [stage * (shape.layers // 4) + 1 for stage in range(4)]
    for layer in tqdm([n for n in first_layers if n < shape.layers], desc="student's stage", unit="stage"):
        (found, *_) = run_ranks(4, partial(_waiting, shape, layer, steps), timeout_s=900.0)
        rows.append({"part": "waiting", "layer": layer, "microbatches": shape.microbatches, **found})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of a microbatch")
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="updates for the waiting times")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the command")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    names = ("tokens", "vocabulary", "hidden", "heads", "tp")
    messages = measure_messages({name: getattr(options, name) for name in names}, options.repeats)
    print(harness.markdown(messages, _MESSAGES))
    waiting = measure_waiting(Shape.tiny() if options.tiny else Shape(layers=8, microbatches=12), options.steps)
    print(harness.markdown(waiting, _WAITING))
    harness.write_rows(options.out / "transport-cpu.jsonl", harness.environment("cpu"), messages + waiting)


if __name__ == "__main__":
    main()
