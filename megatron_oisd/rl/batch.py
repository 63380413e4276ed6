"""From rollouts to the padded, masked microbatches of the policy update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oisd.rl.policy import PolicyMicrobatch
from megatron_oisd.rl.rollout.base import Rollout


@dataclass
class RolloutBatch:
    """The rollouts of one step, equal on every rank; rows are prompt-major, a prompt's samples side by side."""

    tokens: Tensor
    """``[B, s]`` prompt and response, right-padded."""
    mask: Tensor
    """``[B, s]`` bool: set at t where token t + 1 belongs to the response."""
    rollout_log_probs: Tensor
    """``[B, s]`` log-probability the engine gave token t + 1; zero outside the mask."""
    advantages: Tensor
    """``[B]``."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def microbatches(
        self,
        rows: Sequence[int],
        *,
        size: int,
        length_multiple: int,
        old_log_probs: Tensor | None,
        device: torch.device,
    ) -> list[PolicyMicrobatch]:
        """Cut ``rows`` into microbatches of ``size`` sequences.

        Args:
            rows: indices into this batch.
            size: sequences per microbatch; divides ``len(rows)``.
            length_multiple: the padded length is a multiple of it (sequence parallelism shards the length).
            old_log_probs: ``[B, s]`` or None.
            device: where tokens and log-probabilities go; mask and advantages stay on the CPU.
        """
        # All microbatches of a schedule call share one length; what is padding for the longest is cut.
        used = int(self.mask.any(0).nonzero().max()) + 2 if self.mask.any() else 1
        length = -(-used // length_multiple) * length_multiple
        result = []
        for start in range(0, len(rows), size):
            chosen = list(rows[start : start + size])
            result.append(
                PolicyMicrobatch(
                    tokens=_fit(self.tokens[chosen], length).to(device),
                    mask=_fit(self.mask[chosen], length),
                    advantages=self.advantages[chosen],
                    old_log_probs=None if old_log_probs is None else _fit(old_log_probs[chosen], length).to(device),
                    sequence_ids=chosen,
                )
            )
        return result

    def select(self, rows: slice) -> RolloutBatch:
        """The rows of one mini-batch."""
        return RolloutBatch(self.tokens[rows], self.mask[rows], self.rollout_log_probs[rows], self.advantages[rows])


def _fit(tensor: Tensor, length: int) -> Tensor:
    """Cut or zero-pad the last axis to ``length``."""
    if tensor.shape[1] >= length:
        return tensor[:, :length].contiguous()
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]))


def make_batch(rollouts: Sequence[Rollout], advantages: Tensor, *, pad_token_id: int) -> RolloutBatch:
    """Pad rollouts into one batch.

    Args:
        rollouts: prompt-major.
        advantages: ``[B]``.
        pad_token_id: fills the right side; it is never attended to by a real token and never in the mask.
    """
    length = max(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
    shape = (len(rollouts), length)
    tokens = torch.full(shape, pad_token_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    log_probs = torch.zeros(shape)
    for row, rollout in enumerate(rollouts):
        prompt, response = len(rollout.prompt_ids), len(rollout.response_ids)
        tokens[row, : prompt + response] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        mask[row, prompt - 1 : prompt + response - 1] = True
        log_probs[row, prompt - 1 : prompt + response - 1] = torch.tensor(rollout.logprobs)
    return RolloutBatch(tokens, mask, log_probs, advantages)
