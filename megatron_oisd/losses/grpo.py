r"""The clipped policy loss of GRPO and the token log-probabilities it needs, from vocabulary shards.

    r_t = exp(log pi(y_t) - log pi_old(y_t))
    l_t = max(-A r_t, -A clip(r_t, 1 - low, 1 + high));   for A < 0 at most -A * dual_clip (dual clip)

Averaged over all response tokens of the *global* batch (token mean). Shape legend: see :mod:`megatron_oisd.losses`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_oisd.losses.numerics import Group, all_reduce_sum_, log_sum_exp, upcast


class TokenStatistics(NamedTuple):
    """What :func:`vocab_parallel_log_probs` returns, each ``[N]`` and equal on every rank."""

    log_probs: Tensor
    """Log-probability of the target token, natural log; differentiable."""
    entropy: Tensor
    """Entropy of the distribution in nats; no gradient."""


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    group: Group = None,
    temperature: float = 1.0,
    first_token: int = 0,
    valid_columns: int | None = None,
) -> TokenStatistics:
    """Log-probability of ``targets`` and entropy of every row, from this rank's vocabulary shard.

    Args:
        logits: ``[N, v]``, differentiable; shards lie in rank order.
        targets: ``[N]`` token ids of the whole vocabulary.
        group: tensor-parallel group; None for the whole vocabulary on this rank.
        temperature: the sampling temperature.
        first_token: token id of this shard's first column.
        valid_columns: leading columns that are real vocabulary; None: all.

    Collectives: forward one all-gather (``2 N``) and one all-reduce (``2 N``); backward none.
    """
    return TokenStatistics(*_LogProbs.apply(logits, targets, group, temperature, first_token, valid_columns))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: Group,
        temperature: float,
        first_token: int,
        valid_columns: int | None,
    ) -> tuple[Tensor, Tensor]:
        columns = logits.shape[-1] if valid_columns is None else valid_columns
        scaled = upcast(logits[:, :columns]) / temperature
        log_p = scaled - log_sum_exp(scaled, group).unsqueeze(-1)
        p = log_p.exp()
        local = targets - first_token
        here = (local >= 0) & (local < columns)
        index = local.clamp(0, max(columns - 1, 0)).unsqueeze(-1)
        if columns:
            target_log_p = torch.where(here, log_p.gather(-1, index).squeeze(-1), 0.0)
        else:
            target_log_p = log_p.new_zeros(targets.shape)
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
        reduced = all_reduce_sum_(torch.stack([target_log_p, entropy]), group)
        ctx.save_for_backward(p, index, here)
        ctx.temperature, ctx.dtype, ctx.width = temperature, logits.dtype, logits.shape[-1]
        ctx.mark_non_differentiable(reduced[1])
        return reduced[0].clone(), reduced[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        p, index, here = ctx.saved_tensors
        gradient = -p
        if p.shape[-1]:
            gradient.scatter_add_(-1, index, here.to(p.dtype).unsqueeze(-1))
        gradient.mul_((grad_outputs[0] / ctx.temperature).unsqueeze(-1))
        if p.shape[-1] < ctx.width:
            gradient = torch.nn.functional.pad(gradient, (0, ctx.width - p.shape[-1]))
        return gradient.to(ctx.dtype), None, None, None, None, None


class PolicyLoss(NamedTuple):
    """What :func:`policy_loss` returns, each of the inputs' shape."""

    loss: Tensor
    """Per-token loss, not yet masked or averaged."""
    clipped: Tensor
    """1.0 where clipping took effect; no gradient."""
    kl: Tensor
    """Estimate ``r - 1 - log r`` of KL(old || new); no gradient."""


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 10.0,
) -> PolicyLoss:
    """Clipped GRPO loss of every token; all arguments broadcast to one shape."""
    # Beyond e^20 the ratio is clipped anyway; bounding the exponent keeps inf out of 0 * inf.
    log_ratio = (log_probs - old_log_probs.detach()).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(plain, bounded)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    with torch.no_grad():
        clipped = (loss != plain).to(loss.dtype)
        kl = ratio - 1.0 - log_ratio
    return PolicyLoss(loss, clipped, kl)
