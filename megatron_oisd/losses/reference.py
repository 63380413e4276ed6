r"""The slow, obvious reference: GRPO + OISD written straight from the equations, plain autograd, one process.

Tests and benchmarks measure everything else against this file. It shares no code with the fast path: no chunks, no
collectives, no hand-written gradients, key sets listed by loops. In float64 it is exact for the purpose.

The model is an HF causal language model (Qwen3, Llama, ...) prepared by :func:`prepare_model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """JS(p, q) of each row in nats: ``KL(p||m)/2 + KL(q||m)/2`` with ``m = (p + q) / 2``.

    Args:
        student_logits: ``[..., V]``, differentiable.
        teacher_logits: ``[..., V]``, detached here.
        temperature: tau of both.

    Returns:
        ``[...]`` in the logits' own dtype.
    """
    log_p = torch.log_softmax(student_logits / temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    kl_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    kl_q = (log_q.exp() * (log_q - log_m)).sum(-1)
    return 0.5 * kl_p + 0.5 * kl_q


def sampled_key_positions(position: int, window: int, num_global: int) -> list[int]:
    """Keys that a query at ``position`` (from 0 in its sequence) is compared on; see :mod:`.attention`."""
    newest = [position - offset for offset in range(window) if position - offset >= 0]
    num_old = position + 1 - len(newest)
    if num_old <= num_global:
        old = list(range(num_old))
    else:
        old = [math.floor(g * num_old / num_global) for g in range(num_global)]
    return newest + old


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, low: float, high: float, dual: float | None
) -> Tensor:
    """Clipped GRPO loss of every token."""
    ratio = torch.exp(log_probs - old_log_probs)
    loss = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - low, 1 + high))
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -advantages * dual), loss)


@dataclass
class ReferenceLosses:
    """Scalars of one global batch; ``total`` is differentiable in every parameter of the model."""

    total: Tensor
    grpo: Tensor
    think: dict[int, Tensor]
    """L_think by layer (counted from 1)."""
    attn: dict[int, Tensor]
    """L_attn by layer (counted from 1)."""


def oisd_loss(
    model: nn.Module,
    *,
    tokens: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    layers: tuple[int, ...],
    lambda_think: float,
    lambda_attn: float,
    temperature: float,
    advantage_clip: float,
    advantage_weighting: str = "signed",
    window: int,
    num_global: int,
    query_mask: Tensor,
    head_gradient: bool,
    aggregation: str = "sequence",
    grpo_aggregation: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 10.0,
) -> ReferenceLosses:
    """``L_GRPO + lambda_think * L_think + lambda_attn * L_attn`` of one global batch.

    Args:
        model: from :func:`prepare_model`.
        tokens: ``[B, s]`` right-padded token ids.
        mask: ``[B, s]`` bool; set at t where the prediction made at t (token t + 1) belongs to the response.
        advantages: ``[B]``.
        old_log_probs: ``[B, s]`` log-probability of token t + 1 at t.
        layers: student layers, counted from 1.
        lambda_think: weight of L_think.
        lambda_attn: weight of L_attn.
        temperature: tau.
        advantage_clip: c.
        advantage_weighting: ``"signed"``, ``"absolute"`` or ``"none"``.
        window: newest keys.
        num_global: equally spaced older keys.
        query_mask: ``[B, s]`` bool, sampled query positions.
        head_gradient: whether final norm and unembedding receive the lens gradient.
        aggregation: of the OISD losses. ``"sequence"``: mean over sequences of the mean over their positions;
            ``"token"``: the same means, each weighted by its sequence's share of all response tokens.
        grpo_aggregation: of the GRPO loss, likewise.
        clip_low: GRPO's lower clip.
        clip_high: GRPO's upper clip.
        dual_clip: GRPO's dual clip.
    """
    output = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    base: Any = model.model
    num_sequences, _ = tokens.shape

    log_p = torch.log_softmax(output.logits, dim=-1)[:, :-1]
    token_log_probs = log_p.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    per_token = policy_loss(
        token_log_probs, old_log_probs[:, :-1], advantages.unsqueeze(1), clip_low, clip_high, dual_clip
    )
    if grpo_aggregation == "token":
        grpo = (per_token * mask[:, :-1]).sum() / mask.sum()
    else:
        grpo = ((per_token * mask[:, :-1]).sum(1) / mask.sum(1)).mean()

    # The residual stream after each layer; HF's own last entry is already normed, so it comes from the capture.
    streams = [layer.oisd_output for layer in base.layers]
    weights = advantages.clamp(-advantage_clip, advantage_clip)
    if advantage_weighting != "signed":
        weights = weights.abs() if advantage_weighting == "absolute" else torch.ones_like(weights)

    def lens(hidden: Tensor) -> Tensor:
        if head_gradient:
            return base.norm(hidden) @ model.get_output_embeddings().weight.t()  # type: ignore[operator]
        constants = {name: value.detach() for name, value in base.norm.named_parameters()}
        normed = torch.func.functional_call(base.norm, constants, (hidden,))
        return normed @ model.get_output_embeddings().weight.detach().t()  # type: ignore[operator]

    def aggregate(value: Callable[[int, int], Tensor], where: Tensor) -> Tensor:
        total = torch.zeros((), dtype=grpo.dtype)
        for i in range(num_sequences):
            positions = where[i].nonzero().flatten().tolist()
            if not positions:
                continue
            mean = torch.stack([weights[i] * value(i, t) for t in positions]).mean()
            total = total + mean * (1 / num_sequences if aggregation == "sequence" else mask[i].sum() / mask.sum())
        return total

    think, attn = {}, {}
    teacher_logits = output.logits.detach()
    last = base.layers[-1].self_attn
    for layer in layers:
        divergence = jensen_shannon(lens(streams[layer - 1]), teacher_logits, temperature)
        think[layer] = aggregate(lambda i, t, d=divergence: d[i, t], mask)  # type: ignore[misc]
        student = base.layers[layer - 1].self_attn

        def attention_value(i: int, t: int, student: Any = student) -> Tensor:
            keys = sampled_key_positions(t, window, num_global)
            return torch.stack(
                [
                    jensen_shannon(_scores(student, i, j, t, keys), _scores(last, i, j, t, keys))
                    for j in range(student.oisd_query.shape[1])
                ]
            ).mean()

        attn[layer] = aggregate(attention_value, query_mask)
    total = (
        grpo
        + lambda_think * torch.stack(list(think.values())).mean()
        + lambda_attn * torch.stack(list(attn.values())).mean()
    )
    return ReferenceLosses(total, grpo, think, attn)


def _scores(attention: Any, sequence: int, head: int, position: int, keys: list[int]) -> Tensor:
    query, key = attention.oisd_query, attention.oisd_key
    group = head // (query.shape[1] // key.shape[1])
    return key[sequence, group, keys] @ query[sequence, head, position] * attention.scaling


def prepare_model(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Turn an HF decoder into the reference: ``dtype`` throughout, plain attention, layer outputs and q, k kept.

    HF's RMSNorm and its eager softmax compute in fp32 whatever the model's dtype; here both stay in ``dtype``. The
    model is changed in place and returned.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("oisd_reference", _attention)
    model = model.to(dtype)
    model.config._attn_implementation = "oisd_reference"  # type: ignore[union-attr]
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm.__get__(module)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(_keep_output)
    return model


def _keep_output(module: Any, arguments: Any, output: Any) -> None:
    module.oisd_output = output[0] if isinstance(output, tuple) else output


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    module.oisd_query, module.oisd_key = query, key
    repeat = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ keys.transpose(2, 3) * scaling
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~causal, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2), None
