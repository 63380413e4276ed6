"""The layouts that are proved, and the command that writes the table of them: ``python -m tests.layouts``.

Pairwise rather than every combination: each row has one thing that the rows before it do not have, beside what it is
most likely to quarrel with.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import torch
from tqdm import tqdm

from tests.helpers.mcore import OISD_CONFIG, Layout
from tests.helpers.mcore_reference import judge

SEVERAL = replace(OISD_CONFIG, layers=(1, 2, 3))
EARLY, LATE = replace(OISD_CONFIG, layers=(1,)), replace(OISD_CONFIG, layers=(3,))
NO_HEAD = replace(OISD_CONFIG, head_gradient=False)
THINK_ONLY, ATTN_ONLY = replace(OISD_CONFIG, lambda_attn=0.0), replace(OISD_CONFIG, lambda_think=0.0)
LOGITS = replace(SEVERAL, teacher_payload="logits")
# All tokens of the vocabulary: then the tail is empty and the lossy teacher must be exact.
TOPK = replace(SEVERAL, teacher_payload="topk", teacher_topk=150)

FULL = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 2))
FULL_1 = (*FULL[:2], ("recompute_num_layers", 1))
BLOCK = (("recompute_granularity", "full"), ("recompute_method", "block"), ("recompute_num_layers", 1))
SELECTIVE = (("recompute_granularity", "selective"),)
OVERLAP = (("overlap_grad_reduce", True), ("bucket_size", 4000))
DISTRIBUTED = (("use_distributed_optimizer", True),)
PARAM_GATHER = (*OVERLAP, *DISTRIBUTED, ("overlap_param_gather", True))


def _pipeline(layout: str) -> tuple[tuple[str, str], ...]:
    return (("pipeline_model_parallel_layout", layout),)


LAYOUTS = [
    Layout("one rank"),
    Layout("one rank, tied embeddings", tied=True, oisd=SEVERAL),
    # Tensor and sequence parallelism
    Layout("TP 2", tp=2, oisd=SEVERAL),
    Layout("TP 4, more ranks than key heads", tp=4),
    Layout("TP 4, sequence parallel, tied", tp=4, sequence_parallel=True, tied=True, config=(("num_query_groups", 4),)),
    Layout("TP 2, sequence parallel, full recompute", tp=2, sequence_parallel=True, config=FULL, micro_batch=2),
    # Pipeline
    Layout("PP 2", pp=2),
    Layout("PP 2, tied, head gradient off", pp=2, tied=True, oisd=NO_HEAD),
    Layout("PP 2, student on the teacher's stage", pp=2, oisd=LATE),
    Layout("PP 2, students on both stages", pp=2, oisd=SEVERAL, micro_batch=2),
    Layout("PP 3, uneven (1, 2, 1)", pp=3, oisd=SEVERAL, config=_pipeline("Et|tt|tL")),
    Layout("PP 4, tied", pp=4, tied=True, oisd=SEVERAL),
    Layout("PP 4, student on the first layer", pp=4, oisd=EARLY),
    Layout("PP 4, student on the last but one", pp=4, oisd=LATE),
    Layout("PP 3, embedding alone on a stage", pp=3, oisd=SEVERAL, config=_pipeline("E|tt|ttL")),
    Layout("PP 3, loss alone on a stage", pp=3, oisd=SEVERAL, config=_pipeline("Ett|tt|L")),
    Layout("PP 4, embedding and loss alone, tied", pp=4, tied=True, config=_pipeline("E|tt|tt|L")),
    Layout("PP 2, loss alone, attention only", pp=2, oisd=ATTN_ONLY, config=_pipeline("Etttt|L")),
    # Virtual pipeline
    Layout("PP 2, VPP 2", pp=2, vpp=2, oisd=SEVERAL),
    Layout("PP 2, VPP 2, tied, full recompute", pp=2, vpp=2, tied=True, oisd=SEVERAL, config=FULL_1),
    Layout("PP 2, VPP 2, uneven layout", pp=2, vpp=2, oisd=SEVERAL, config=_pipeline("E|tt|t|tL")),
    Layout("PP 2, VPP 2, loss alone on a chunk", pp=2, vpp=2, oisd=SEVERAL, config=_pipeline("Et|t|tt|L")),
    Layout("PP 2, VPP 4", pp=2, vpp=4, oisd=SEVERAL, config=_pipeline("E|t|t||t|t||L")),
    Layout("PP 4, VPP 2", pp=4, vpp=2, oisd=SEVERAL, config=_pipeline("E|t||t|t||t|L")),
    Layout("TP 2, PP 2, VPP 2, sequence parallel", tp=2, pp=2, vpp=2, sequence_parallel=True, oisd=SEVERAL),
    # Data parallel
    Layout("DP 2, distributed optimizer", dp=2, ddp=DISTRIBUTED),
    Layout("DP 2, overlapped gradient reduction", dp=2, ddp=OVERLAP, steps=3, tied=True),
    Layout("DP 2, PP 2, overlapped gradient reduction", dp=2, pp=2, ddp=OVERLAP, steps=3, oisd=SEVERAL),
    Layout(
        "DP 2, PP 2, overlapped reduction, distributed optimizer, tied", dp=2, pp=2, ddp=(*OVERLAP, *DISTRIBUTED),
        steps=3, tied=True,
    ),
    Layout("DP 2, PP 2, VPP 2, overlapped reduction", dp=2, pp=2, vpp=2, ddp=OVERLAP, steps=3, oisd=SEVERAL),
    Layout("DP 2, PP 2, overlapped parameter gather", dp=2, pp=2, ddp=PARAM_GATHER, steps=3),
    Layout("DP 2, PP 2, mean loss", dp=2, pp=2, per_token_loss=False),
    # Recomputation
    Layout("PP 2, full recompute, uniform", pp=2, config=FULL, oisd=EARLY),
    Layout("PP 2, full recompute, block", pp=2, config=BLOCK, oisd=SEVERAL),
    Layout("PP 2, selective recompute", pp=2, config=SELECTIVE, oisd=SEVERAL),
    # Sequences
    Layout("PP 2, packed THD", pp=2, packed=True, micro_batch=2, oisd=SEVERAL),
    Layout("TP 2, packed THD, sequence parallel", tp=2, packed=True, micro_batch=4, sequence_parallel=True),
    Layout(
        "PP 2, packed THD, full recompute, token aggregation", pp=2, packed=True, micro_batch=2, config=FULL,
        oisd=replace(SEVERAL, aggregation="token"),
    ),
    Layout("PP 2, variable sequence lengths", pp=2, variable=True),
    Layout("PP 2, VPP 2, variable sequence lengths", pp=2, vpp=2, variable=True, oisd=SEVERAL),
    Layout("CP 2", cp=2, oisd=SEVERAL),
    Layout("CP 4", cp=4, oisd=LATE),
    Layout("CP 2, PP 2", cp=2, pp=2, oisd=SEVERAL, tied=True),
    Layout("CP 2, TP 2, sequence parallel, packed", cp=2, tp=2, sequence_parallel=True, packed=True, micro_batch=2),
    Layout("CP 2, PP 2, mean loss", cp=2, pp=2, per_token_loss=False),
    # Models
    Layout("MoE, one rank", model="moe", oisd=SEVERAL, tolerance=5e-5),
    Layout("MoE, EP 2, DP 2", model="moe", ep=2, dp=2, oisd=SEVERAL, tolerance=5e-5),
    Layout("MoE, EP 2, DP 2, PP 2", model="moe", ep=2, dp=2, pp=2, tolerance=5e-5),
    Layout(
        "MoE, TP 2, PP 2, sequence parallel", model="moe", tp=2, pp=2, sequence_parallel=True, oisd=SEVERAL,
        tolerance=5e-5,
    ),
    Layout("MoE, EP 2, overlapped reduction", model="moe", ep=2, dp=2, ddp=OVERLAP, steps=3, tolerance=5e-5),
    Layout("MLA, PP 2", model="mla", pp=2, oisd=SEVERAL),
    Layout("MLA, PP 2, VPP 2, full recompute", model="mla", pp=2, vpp=2, config=FULL_1, oisd=SEVERAL),
    Layout("MLA, packed THD", model="mla", packed=True, micro_batch=2),
    Layout("MTP head", model="mtp", oisd=SEVERAL),
    Layout("MTP head, PP 2", model="mtp", pp=2, oisd=SEVERAL),
    Layout("MTP head, PP 2, logits payload", model="mtp", pp=2, oisd=LOGITS),
    Layout("sliding windows, PP 2", model="window", pp=2, oisd=SEVERAL),
    Layout("frozen trunk, PP 2", pp=2, config=(("frozen", "trunk"),), oisd=SEVERAL),
    Layout("nothing trained below the student, PP 2", pp=2, config=(("frozen", "below"),)),
    Layout("nothing trained below, DP 2, overlap", dp=2, ddp=OVERLAP, steps=3, config=(("frozen", "below"),)),
    # Payloads
    Layout("PP 2, logits payload", pp=2, oisd=LOGITS),
    Layout("TP 2, PP 2, logits payload, sequence parallel", tp=2, pp=2, sequence_parallel=True, oisd=LOGITS),
    Layout("PP 2, top-k payload of the whole vocabulary", pp=2, oisd=TOPK),
    Layout("TP 2, PP 2, top-k payload, sequence parallel", tp=2, pp=2, sequence_parallel=True, oisd=TOPK),
    Layout("TP 2, PP 2, logits alone", tp=2, pp=2, oisd=THINK_ONLY),
    # Precision
    Layout("float64, TP 2, PP 2", tp=2, pp=2, dtype=torch.float64, tolerance=5e-7),
    Layout("bf16, fp32 gradients, PP 2", pp=2, dtype=torch.bfloat16, tolerance=0.1),
    Layout(
        "bf16, TP 2, PP 2, sequence parallel", tp=2, pp=2, sequence_parallel=True, dtype=torch.bfloat16, tolerance=0.1
    ),
    Layout("fp16, loss scale 1024, PP 2", pp=2, dtype=torch.float16, loss_scale=1024.0, tolerance=0.02),
]  # fmt: skip


HEADING = """# Layouts

Loss and every gradient of one GRPO + OISD step on each layout, against a dense float64 reference of the same model in
one process (`tests/helpers/mcore_reference.py`). Written by `python -m tests.layouts --write docs/layouts.md`; the same
rows are tests (`tests/pipeline/test_layouts.py`). The model has 4 layers; "students" are layers counted from 1.

*Value*: largest relative error of the OISD losses. *Gradient*: largest `max|difference| / max|expected|` over all
parameters; in half precision norm of the difference over norm, with the same rounded weights in the reference.
*Replicas*: largest difference between ranks that hold the same parameter, over the largest gradient.

"""


def describe(layout: Layout) -> str:
    """The settings of a row beyond its name."""
    oisd = layout.oisd
    assert oisd is not None
    parts = ["students " + ", ".join(map(str, oisd.layers)), "tied" if layout.tied else "untied"]
    parts += [] if oisd.head_gradient else ["head gradient off"]
    parts += [f"micro-batch {layout.micro_batch}"] if layout.micro_batch > 1 else []
    parts += [f"{name}={value}".replace("|", "\\|") for name, value in layout.config]
    return "; ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run every layout, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there as Markdown")
    parser.add_argument("--only", default="", metavar="TEXT", help="layouts whose name contains it")
    options = parser.parse_args(argv)
    chosen = [layout for layout in LAYOUTS if options.only in layout.name]
    lines = ["| layout | ranks | value | gradient | replicas | tolerance | settings |", "|---|---|---|---|---|---|---|"]
    failures = []
    for layout in tqdm(chosen, unit="layout"):
        verdict = judge(layout)
        lines.append(
            f"| {layout.name} | {layout.world} | {verdict.value_error:.1e} | {verdict.gradient_error:.1e} | "
            f"{verdict.apart:.1e} | {layout.tolerance:.0e} | {describe(layout)} |"
        )
        if not verdict.within(layout.tolerance):
            failures.append(f"{layout.name}: {verdict}")
    environment = (
        f"torch {torch.__version__}, megatron-core {version('megatron-core')}, Python {python_version()}, gloo."
    )
    table = "\n".join(lines)
    print(table)
    if options.write is not None:
        options.write.write_text(f"{HEADING}{environment}\n\n{table}\n", encoding="utf-8")
    for failure in failures:
        print(f"beyond its tolerance: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
