r"""What to do about the engine's log-probabilities not being the trainer's.

A rollout engine samples from mu, its own numerics of the policy pi_old that the trainer computes gradients of. With
``d_t = log pi_old(y_t) - log mu(y_t)``:

    truncated importance sampling   the policy loss of token t times min(rho_t, C), rho_t = exp(d_t) ("token") or
                                    exp(sum of d over the sequence) ("sequence")
    masking                         tokens whose rho_t lies outside [1/C, C] leave the batch ("token"), or sequences
                                    whose geometric mean exp(mean of d) does ("geometric")

Source: truncated importance sampling, Ionides 2008; for the mismatch of engines, Yao et al. 2025 (Your efficient RL
framework secretly brings you off-policy RL training). Shapes ``[B, s]``; B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMPORTANCE_LEVELS = ("none", "token", "sequence")
REJECTION_LEVELS = ("none", "token", "geometric")
_BOUND = 20.0


def truncated_importance(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, *, level: str, threshold: float
) -> Tensor:
    """Weights ``min(rho, threshold)``, without gradient; 1 outside the mask and for ``level="none"``."""
    difference = torch.where(mask, old_log_probs - rollout_log_probs, 0.0)
    if level == "none":
        return torch.ones_like(difference)
    if level == "sequence":
        difference = difference.double().sum(1, keepdim=True).to(difference.dtype).expand_as(difference)
    weights = difference.clamp(-_BOUND, _BOUND).exp().clamp_max(threshold)
    return torch.where(mask, weights, 1.0)


def rejection_mask(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, *, level: str, threshold: float
) -> Tensor:
    """The part of ``mask`` that may be trained on."""
    if level == "none":
        return mask
    difference = torch.where(mask, old_log_probs - rollout_log_probs, 0.0).double()
    if level == "geometric":
        difference = (difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)).expand_as(difference)
    bound = torch.tensor(threshold, dtype=torch.float64).log()
    return mask & (difference.abs() <= bound)


def mismatch(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the engine was from the trainer.

    ``log_prob_diff_mean`` and ``_max``: of ``|d|``; ``probs_diff_mean`` and ``_max``: of ``|pi_old - mu|``, which verl
    reports; ``kl``: the k3 estimate of KL(mu || pi_old), ``ppl_ratio``: exp of the mean of d over sequences' means.
    """
    difference = (old_log_probs - rollout_log_probs)[mask].double()
    if not difference.numel():
        names = ("log_prob_diff_mean", "log_prob_diff_max", "probs_diff_mean", "probs_diff_max", "kl")
        return dict.fromkeys(names, 0.0) | {"ppl_ratio": 1.0}
    probs = (old_log_probs[mask].double().exp() - rollout_log_probs[mask].double().exp()).abs()
    by_sequence = torch.where(mask, old_log_probs - rollout_log_probs, 0.0).double().sum(1)
    counts = mask.sum(1)
    means = by_sequence[counts > 0] / counts[counts > 0]
    return {
        "log_prob_diff_mean": difference.abs().mean().item(),
        "log_prob_diff_max": difference.abs().max().item(),
        "probs_diff_mean": probs.mean().item(),
        "probs_diff_max": probs.max().item(),
        "kl": (torch.expm1(difference.clamp(-_BOUND, _BOUND)) - difference).mean().item(),
        "ppl_ratio": means.mean().exp().item(),
    }
