r"""The policy losses of GRPO and its relatives, and the token log-probabilities they need, from vocabulary shards.

    r_t = exp(log pi(y_t) - log pi_old(y_t))
    l_t = max(-A r_t, -A clip(r_t, 1 - low, 1 + high));   for A < 0 at most -A * dual_clip (dual clip)

``high > low`` is DAPO's clip-higher. To it come, as options, ``beta * KL(pi || pi_ref)`` by an estimator per token and
``-alpha * H(pi)``. How tokens become one number is :mod:`megatron_oisd.losses.aggregate`'s. Shape legend: see
:mod:`megatron_oisd.losses`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.losses.numerics import Group, group_size, upcast

KL_ESTIMATORS = ("k1", "k2", "k3")
_CHUNK_ELEMENTS = 2**25
"""Logits upcast at one time: 128 MiB in fp32."""
_LOWEST = -1e4
"""Log-probabilities below it are 0 as probabilities in every dtype; it keeps ``0 * inf`` out."""


class TokenStatistics(NamedTuple):
    """What :func:`vocab_parallel_log_probs` returns, each ``[N]`` and equal on every rank."""

    log_probs: Tensor
    """Log-probability of the target token, natural log; differentiable."""
    entropy: Tensor
    """Entropy of the distribution in nats; differentiable where asked for."""


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    group: Group = None,
    temperature: float = 1.0,
    first_token: int = 0,
    valid_columns: int | None = None,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """Log-probability of ``targets`` and entropy of every row, from this rank's vocabulary shard.

    No probabilities are kept for the backward pass, they are made again from the logits, chunk by chunk: beside logits
    and their gradient at most 128 MiB are alive.

    Args:
        logits: ``[N, v]``, differentiable; shards lie in rank order.
        targets: ``[N]`` token ids of the whole vocabulary.
        group: tensor-parallel group; None for the whole vocabulary on this rank.
        temperature: the sampling temperature.
        first_token: token id of this shard's first column.
        valid_columns: leading columns that are real vocabulary; None: all.
        entropy_gradient: let the entropy have a gradient, ``dH/dz = -p (log p + H) / temperature``.

    Collectives: forward one all-gather (``4 N``); backward none.
    """
    return TokenStatistics(
        *_LogProbs.apply(logits, targets, group, temperature, first_token, valid_columns, entropy_gradient)
    )


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
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        columns = logits.shape[-1] if valid_columns is None else valid_columns
        local = targets - first_token
        here = (local >= 0) & (local < columns)
        index = local.clamp(0, max(columns - 1, 0)).unsqueeze(-1)
        dtype = upcast(logits[:0]).dtype
        # Of this shard: largest logit m, sum of exp(z - m), sum of exp(z - m) (z - m), the target's logit.
        shard = torch.zeros(4, logits.shape[0], dtype=dtype, device=logits.device)
        shard[0] = float("-inf")
        if columns:
            for rows in _chunks(logits):
                z = upcast(logits[rows, :columns]) / temperature
                shard[3, rows] = torch.where(here[rows], z.gather(-1, index[rows]).squeeze(-1), 0.0)
                shard[0, rows] = z.amax(-1)
                z = z.sub_(shard[0, rows].unsqueeze(-1)).clamp_(min=_LOWEST)
                e = z.exp()
                shard[1, rows] = e.sum(-1)
                shard[2, rows] = e.mul_(z).sum(-1)
        shards = _gathered(shard, group)
        largest = shards[:, 0].amax(0)
        below = (shards[:, 0] - largest).clamp_min(_LOWEST)
        scale = below.exp()
        total = (shards[:, 1] * scale).sum(0)
        log_total = total.log()
        lse = largest + log_total
        entropy = log_total - ((shards[:, 2] + shards[:, 1] * below) * scale).sum(0) / total
        log_probs = shards[:, 3].sum(0) - lse
        ctx.save_for_backward(logits, lse, entropy, index, here)
        ctx.temperature, ctx.columns, ctx.entropy_gradient = temperature, columns, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, entropy, index, here = ctx.saved_tensors
        columns = ctx.columns
        gradient = torch.zeros_like(logits)
        if columns:
            for rows in _chunks(logits):
                log_p = upcast(logits[rows, :columns]).div(ctx.temperature).sub_(lse[rows].unsqueeze(-1))
                log_p.clamp_(min=_LOWEST)
                p = log_p.exp()
                upstream = (grad_outputs[0][rows] / ctx.temperature).unsqueeze(-1)
                result = p * -upstream
                result.scatter_add_(-1, index[rows], here[rows].unsqueeze(-1) * upstream)
                if ctx.entropy_gradient:
                    by_entropy = (grad_outputs[1][rows] / ctx.temperature).unsqueeze(-1)
                    result -= by_entropy * p * (log_p + entropy[rows].unsqueeze(-1))
                gradient[rows, :columns] = result.to(gradient.dtype)
        return gradient, None, None, None, None, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS // max(logits.shape[1], 1))
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


def _gathered(shard: Tensor, group: Group) -> Tensor:
    """``[ranks, 4, N]``."""
    if group_size(group) == 1:
        return shard.unsqueeze(0)
    result = shard.new_empty((group_size(group), *shard.shape))
    dist.all_gather(list(result.unbind(0)), shard, group=group)
    return result


class PolicyLoss(NamedTuple):
    """What :func:`policy_loss` returns, each of the inputs' shape."""

    loss: Tensor
    """Per-token loss, not yet masked or averaged."""
    clipped: Tensor
    """1.0 where clipping took effect; no gradient."""
    kl: Tensor
    """``log pi_old - log pi``, whose mean estimates KL(old || new); no gradient."""


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 10.0,
) -> PolicyLoss:
    """Clipped GRPO loss of every token; all arguments broadcast to one shape.

    Source: PPO's clipping (Schulman et al. 2017); dual clip (Ye et al. 2020); ``clip_high > clip_low`` (DAPO, Yu et
    al. 2025).
    """
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
    return PolicyLoss(loss, clipped, -log_ratio.detach())


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL(pi || pi_ref) at every sampled token; with ``d = log pi - log pi_ref``:

    ``k1``: d, unbiased as a value; its gradient is 0 on average.
    ``k2``: d^2 / 2, whose gradient is that of the KL on policy.
    ``k3``: exp(-d) - 1 + d, at least 0 and of low variance; GRPO's.

    Source: J. Schulman, Approximating KL Divergence (2020); GRPO (Shao et al. 2024).

    Raises:
        ValueError: the estimator is unknown.
    """
    difference = (log_probs - reference_log_probs.detach()).clamp(-20.0, 20.0)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"KL estimator {estimator!r}: expected one of {', '.join(KL_ESTIMATORS)}")
