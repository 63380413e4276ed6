"""Group-normalised advantages (GRPO) and the OISD weight made from them."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, epsilon: float = 1e-6, normalise_std: bool = True) -> Tensor:
    """GRPO advantages ``(r - mean(group)) / (std(group) + epsilon)``.

    Args:
        rewards: ``[prompts, samples]``, one group per row; at least one sample.
        epsilon: added to the (sample) standard deviation.
        normalise_std: divide by the standard deviation; False subtracts the mean only (Dr. GRPO).

    Returns:
        ``[prompts, samples]``; exactly 0 for a group whose rewards are all equal, and for groups of one.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not normalise_std:
        return centred
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    # Equal rewards: exactly 0, whatever the rounding of their mean was.
    centred = torch.where(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, centred)
    return centred / (rewards.std(dim=1, keepdim=True) + epsilon)


def alignment_weight(advantages: Tensor, clip: float, weighting: str = "signed") -> Tensor:
    """The weight of a token's divergence.

    ``signed``: OISD's ``w = clip(A, -c, c)``, positive pulls the student to the teacher, negative pushes it away.
    ``absolute``: ``|w|``, which pulls always. ``none``: 1, distillation without regard to the reward.
    """
    if weighting == "none":
        return torch.ones_like(advantages)
    weight = advantages.clamp(-clip, clip)
    return weight.abs() if weighting == "absolute" else weight
