"""Any Megatron-Core layout against a dense float64 reference of the same model, loss and every gradient.

The reference runs the model of ``mcore.py`` in one process in float64, one sequence after the other, and computes GRPO
and OISD densely with plain autograd; its losses share no code with the fast path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.helpers.mcore import (
    LENGTH,
    OISD_CONFIG,
    VOCAB,
    Layout,
    Rollouts,
    assemble,
    build_chunks,
    fill,
    make_rollouts,
    pieces,
    transformer,
)
from tests.helpers.mcore_run import Outcome, parallel_world, run_layout
from tests.helpers.ranks import run_ranks


def run_reference(layout: Layout, batch: Rollouts) -> Outcome:
    """The dense losses of the same model in one process, in float64; called on one rank."""
    alone = Layout(
        "reference", model=layout.model, tied=layout.tied, oisd=layout.oisd, dtype=torch.float64,
        config=tuple((k, v) for k, v in layout.config if k in ("frozen", "num_query_groups")),
    )  # fmt: skip
    with parallel_world(alone):
        config = transformer(alone)
        (model,) = build_chunks(alone, config)
        half = layout.dtype if layout.dtype in (torch.bfloat16, torch.float16) else None
        fill([model], half)
        model.train()
        dense = DenseLosses(model, layout, batch)
        values = dense.backward()
        return Outcome(values.pop("loss"), values, pieces([model]))


class DenseLosses:
    """GRPO + OISD straight from the equations, sequence by sequence; gradients by plain autograd."""

    def __init__(self, model: Any, layout: Layout, batch: Rollouts) -> None:
        from megatron_oisd.pipeline.checks import shared_sliding_window

        self.model, self.layout = model, layout
        self.oisd = layout.oisd or replace(OISD_CONFIG, lambda_think=0.0, lambda_attn=0.0)
        self.kept: dict[Any, Any] = {}
        window = shared_sliding_window(model.config, (*self.oisd.layers, 4))
        self.left = None if window is None else window[0]
        for layer in model.decoder.layers:
            number = layer.layer_number
            layer.register_forward_hook(partial(self._keep, ("hidden", number)))
            layer.self_attention.core_attention.register_forward_hook(
                partial(self._keep_scores, number, layer.self_attention), with_kwargs=True
            )
        self.take(batch, layout.steps - 1)

    def take(self, batch: Rollouts, step: int) -> None:
        """Go on with another batch, as that of optimizer step ``step``."""
        from megatron_oisd.losses.attention import sample_query_positions

        self.batch = batch
        self.queries = sample_query_positions(
            batch.mask, num_queries=self.oisd.attn_queries, seed=self.oisd.seed, step=step,
            sequence_ids=list(range(len(batch.tokens))),
        )  # fmt: skip

    def _keep(self, name: Any, module: Any, args: Any, output: Any) -> None:
        self.kept[name] = output[0] if isinstance(output, tuple) else output

    def _keep_scores(self, number: int, attention: Any, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        query, key = (args[0], args[1]) if len(args) > 1 else (kwargs["query"], kwargs["key"])
        scale = getattr(attention, "softmax_scale", None) or 1 / math.sqrt(query.shape[-1])
        self.kept["qk", number] = query[:, 0], key[:, 0].repeat_interleave(query.shape[2] // key.shape[2], 1), scale

    def _lens(self, hidden: Tensor) -> Tensor:
        model = self.model
        weight = model.shared_embedding_or_output_weight() if self.layout.tied else model.output_layer.weight
        norm = dict(model.decoder.final_layernorm.named_parameters())
        if not self.oisd.head_gradient:
            weight, norm = weight.detach(), {name: value.detach() for name, value in norm.items()}
        normed = torch.func.functional_call(model.decoder.final_layernorm, norm, (hidden,))
        return normed @ weight[:VOCAB].t()

    def _scores(self, number: int, t: int, keys: list[int]) -> Tensor:
        query, key, scale = self.kept["qk", number]
        return torch.stack([key[keys, j] @ query[t, j] * scale for j in range(query.shape[1])])

    def _keys(self, t: int) -> list[int]:
        from megatron_oisd.losses.reference import sampled_key_positions

        first = 0 if self.left is None else max(0, t - self.left)
        positions = sampled_key_positions(t - first, self.oisd.attn_window, self.oisd.attn_global_keys)
        return [first + position for position in positions]

    @property
    def loss_tokens(self) -> float:
        """What the sum of the policy loss is divided by."""
        return float(self.batch.mask.sum())

    def log_probs(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``[s]`` log-probability of each target under the policy; ``logits`` has the padding's columns too."""
        return logits[:, :VOCAB].log_softmax(-1).gather(-1, targets.unsqueeze(1)).squeeze(1)

    def policy_loss(self, row: int, log_probs: Tensor, advantage: Tensor) -> Tensor:
        """``[s]`` loss of each prediction of a sequence."""
        from megatron_oisd.losses import reference as ref

        return ref.policy_loss(log_probs, self.batch.old_log_probs[row].double(), advantage, 0.2, 0.2, 10.0)

    def backward(self) -> dict[str, float]:
        from megatron_oisd.losses import reference as ref

        batch, oisd, layers = self.batch, self.oisd, self.oisd.layers
        total_tokens, count = batch.mask.sum(), len(batch.tokens)
        names = [f"oisd/{kind}/layer_{n}" for kind in ("think", "attn") for n in layers]
        values = dict.fromkeys(["loss", *names], 0.0)
        if self.layout.model == "mtp":
            from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

            MTPLossAutoScaler.set_loss_scale(1.0 / total_tokens.double())
        for i in range(count):
            tokens, where = batch.tokens[i : i + 1], batch.mask[i].nonzero().flatten().tolist()
            positions = torch.arange(LENGTH).unsqueeze(0)
            targets = torch.roll(tokens, -1, 1)
            extra = {"labels": targets} if self.layout.model == "mtp" else {}
            output = self.model(tokens, positions, None, **extra)
            advantage, weight = batch.advantages[i].double(), batch.advantages[i].double()
            weight = weight.clamp(-oisd.advantage_clip, oisd.advantage_clip)
            if extra:
                log_probs = -output[0]
                final = self._lens(self.kept["hidden", 4][:, 0]).detach()
            else:
                final = output[0, :, :VOCAB]
                log_probs = self.log_probs(output[0], targets[0])
            per_token = self.policy_loss(i, log_probs, advantage)[where]
            # A microbatch of one sequence: its token mean, averaged over microbatches.
            policy = per_token.sum() / self.loss_tokens if self.layout.per_token_loss else per_token.mean() / count
            share = len(where) / total_tokens if oisd.aggregation == "token" else 1.0 / count
            values["loss"] += per_token.sum().item()
            total = policy
            for number in layers:
                if oisd.lambda_think:
                    student = self._lens(self.kept["hidden", number][:, 0])
                    divergence = ref.jensen_shannon(student[where], final[where], oisd.temperature)
                    think = share * weight * divergence.mean()
                    total = total + oisd.lambda_think / len(layers) * think
                    values[f"oisd/think/layer_{number}"] += think.item()
                if oisd.lambda_attn:
                    queries = self.queries[i].nonzero().flatten().tolist()
                    each = [
                        ref.jensen_shannon(self._scores(number, t, keys), self._scores(4, t, keys)).mean()
                        for t, keys in ((t, self._keys(t)) for t in queries)
                    ]
                    attn = share * weight * torch.stack(each).mean()
                    total = total + oisd.lambda_attn / len(layers) * attn
                    values[f"oisd/attn/layer_{number}"] += attn.item()
            total.backward()
        return values


_known: dict[tuple[Any, ...], tuple[Outcome, dict[str, Tensor]]] = {}


def reference(layout: Layout) -> tuple[Outcome, dict[str, Tensor]]:
    """The reference's values and whole gradients; the same for every layout of one model."""
    if layout.key not in _known:
        (outcome,) = run_ranks(1, run_reference, layout, make_rollouts())
        _known[layout.key] = outcome, assemble([outcome.gradients])[0]
    return _known[layout.key]


# ---------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Verdict:
    """How far a layout is from the reference."""

    value_error: float
    """Largest relative difference of policy loss and OISD losses."""
    gradient_error: float
    """Largest ``max|difference| / max|expected|`` over all parameters; half precision: norm over norm."""
    parameter: str
    """Where."""
    apart: float
    """Largest difference between ranks that hold the same part, over the largest gradient."""

    def within(self, tolerance: float) -> bool:
        return max(self.value_error, self.gradient_error, self.apart) < tolerance


def judge(layout: Layout) -> Verdict:
    """Run the layout and compare it with the reference."""
    expected, whole = reference(layout)
    outcomes = run_ranks(layout.world, run_layout, layout, make_rollouts())
    found, apart = assemble([outcome.gradients for outcome in outcomes])
    assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
    half = layout.dtype in (torch.bfloat16, torch.float16)
    errors = {}
    for name, gradient in whole.items():
        difference = found[name] - gradient
        size = torch.linalg.vector_norm if half else (lambda tensor: tensor.abs().max())
        errors[name] = (size(difference) / size(gradient).clamp_min(1e-12)).item()
    worst = max(errors, key=errors.__getitem__)
    wrong = []
    for outcome in outcomes:
        for name, value in expected.metrics.items():
            if value:
                wrong.append(abs(outcome.metrics[name] - value) / abs(value))
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    return Verdict(max(wrong, default=0.0), errors[worst], worst, apart / largest)
