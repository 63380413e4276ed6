"""Fifty optimizer steps: the golden trajectory and the layouts that must follow it.

The golden one is made by ``python -m tests.trajectory --write``: the dense float64 losses of one process
(:class:`tests.helpers.mcore_reference.DenseLosses`) under ``torch.optim.AdamW`` with clipped gradients. Nothing of it
is this package's fast path or Megatron's optimizer. A layout runs Megatron's optimizer in fp32 on other batches in
every step.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from tqdm import tqdm

from tests.helpers.mcore import OISD_CONFIG, Layout, build_chunks, fill, make_rollouts, transformer
from tests.helpers.mcore_reference import DenseLosses
from tests.helpers.mcore_run import parallel_world, start
from tests.helpers.ranks import run_ranks

GOLDEN = Path(__file__).parent / "golden" / "trajectory.json"
STEPS = 50
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.01, 1.0
OISD = replace(OISD_CONFIG, layers=(1, 3), attn_queries=6)

LAYOUTS = [
    Layout("one rank", oisd=OISD),
    Layout("PP 2, student and teacher apart", pp=2, oisd=OISD),
    Layout("TP 2, PP 2, sequence parallel", tp=2, pp=2, sequence_parallel=True, oisd=OISD),
    Layout("PP 2, VPP 2", pp=2, vpp=2, oisd=OISD),
    Layout(
        "DP 2, PP 2, distributed optimizer, everything overlapped", dp=2, pp=2, oisd=OISD,
        ddp=(
            ("overlap_grad_reduce", True), ("bucket_size", 4000), ("use_distributed_optimizer", True),
            ("overlap_param_gather", True),
        ),
    ),
    Layout(
        "PP 2, full recompute, packed", pp=2, packed=True, micro_batch=2, oisd=OISD,
        config=(("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1)),
    ),
]  # fmt: skip

HALF = [
    Layout("bf16, fp32 gradients, PP 2", pp=2, oisd=OISD, dtype=torch.bfloat16),
    Layout("fp16, Megatron's gradient scaler, PP 2", pp=2, oisd=OISD, dtype=torch.float16),
]
"""Half precision: weights are rounded in every step, so that they follow for some steps and not closely."""

Trajectory = dict[str, list[float]]


def batch_of(step: int) -> Any:
    """Another batch in every step."""
    return make_rollouts(seed=1000 + step)


def names() -> list[str]:
    """What is recorded of every step, beside the gradient norm."""
    return ["loss", *(f"oisd/{kind}/layer_{layer}" for kind in ("think", "attn") for layer in OISD.layers)]


def dense(steps: int = STEPS, progress: bool = False) -> Trajectory:
    """The golden trajectory; called on one rank."""
    layout = Layout("golden", oisd=OISD, dtype=torch.float64)
    with parallel_world(layout):
        (model,) = build_chunks(layout, transformer(layout))
        fill([model])
        model.train()
        losses = DenseLosses(model, layout, batch_of(0))
        parameters = list(model.parameters())
        # Megatron's rule: no decay of vectors.
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8,
        )  # fmt: skip
        result: Trajectory = {name: [] for name in [*names(), "grad_norm"]}
        for step in tqdm(range(steps), disable=not progress):
            optimizer.zero_grad()
            batch = batch_of(step)
            losses.take(batch, step)
            values = losses.backward()
            for name in names():
                result[name].append(values[name] / (int(batch.mask.sum()) if name == "loss" else 1))
            result["grad_norm"].append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
            optimizer.step()
        return result


def on_layout(layout: Layout, steps: int = STEPS, sabotage: str = "") -> Trajectory:
    """The same training with Megatron's optimizer on a layout; called on every rank.

    ``sabotage`` leaves something out: ``"refresh"`` of the lens replicas, ``"gather"`` of parameters before it,
    ``"hold"`` of the buckets that the lens gradient is added to.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_oisd.pipeline import oisd as attaching
    from megatron_oisd.pipeline.lens import Lens
    from megatron_oisd.runtime.model import taken

    with parallel_world(layout):
        training = start(layout, batch_of(0))
        if sabotage == "refresh":
            Lens.refresh = lambda *args: None  # type: ignore[method-assign]
        elif sabotage == "gather":
            attaching.gather_parameters = lambda *args: None
        elif sabotage == "hold":
            attaching.HeldBuckets.hold = lambda *args: None  # type: ignore[method-assign]
        options = OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_grad=CLIP, adam_beta1=0.9,
            adam_beta2=0.999, adam_eps=1e-8,
            use_distributed_optimizer=bool(dict(layout.ddp).get("use_distributed_optimizer")),
            **taken(OptimizerConfig, overlap_param_gather=bool(dict(layout.ddp).get("overlap_param_gather"))),
            bf16=layout.dtype is torch.bfloat16, fp16=layout.dtype is torch.float16, initial_loss_scale=2.0**8,
        )  # fmt: skip
        optimizer = get_megatron_optimizer(options, training.chunks)
        training.config.grad_scale_func = optimizer.scale_loss
        # It is the scheduler that spares vectors from decay.
        scheduler = OptimizerParamScheduler(
            optimizer, init_lr=0.0, max_lr=LEARNING_RATE, min_lr=LEARNING_RATE, lr_warmup_steps=0, lr_decay_steps=2,
            lr_decay_style="constant", start_wd=WEIGHT_DECAY, end_wd=WEIGHT_DECAY, wd_incr_steps=0,
            wd_incr_style="constant",
        )  # fmt: skip
        result: Trajectory = {name: [] for name in [*names(), "grad_norm"]}
        for step in range(steps):
            optimizer.zero_grad()
            batch = batch_of(step)
            loss = torch.tensor(training.forward_backward(batch, step=step))
            # The last stage has the loss, each data-parallel rank that of its own sequences.
            for group in (
                parallel_state.get_pipeline_model_parallel_group(),
                parallel_state.get_data_parallel_group(with_context_parallel=True),
            ):
                dist.all_reduce(loss, group=group)
            successful, norm, _ = optimizer.step()
            assert successful
            scheduler.step(1)
            training.oisd.sync()
            metrics = training.oisd.metrics()
            result["loss"].append(loss.item() / int(batch.mask.sum()))
            for name in names()[1:]:
                result[name].append(metrics[name])
            result["grad_norm"].append(float(norm))
        training.oisd.detach()
        return result


def golden() -> Trajectory:
    """The committed trajectory."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["trajectory"]


def main(argv: list[str] | None = None) -> int:
    """Make the golden file, or compare the layouts with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"make {GOLDEN.name} anew")
    options = parser.parse_args(argv)
    if options.write:
        (trajectory,) = run_ranks(1, dense, STEPS, True, timeout_s=3600.0)
        environment = {
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
            "python": python_version(),
        }
        GOLDEN.write_text(json.dumps({"environment": environment, "trajectory": trajectory}, indent=1) + "\n")
        return 0
    expected = golden()
    for layout in LAYOUTS:
        found = run_ranks(layout.world, on_layout, layout)[0]
        errors = {name: deviation(found[name], expected[name]) for name in expected}
        print(layout.name, {name: f"{error:.1e} ({mean:.1e})" for name, (error, mean) in errors.items()})
    return 0


def deviation(found: list[float], expected: list[float]) -> tuple[float, float]:
    """Largest difference and mean difference, both over the largest expected value."""
    difference = torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)
    scale = torch.tensor(expected, dtype=torch.float64).abs().max()
    return (difference.abs().max() / scale).item(), (difference.mean() / scale).item()


if __name__ == "__main__":
    sys.exit(main())
