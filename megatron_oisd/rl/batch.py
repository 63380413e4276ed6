"""From rollouts to the masked microbatches of the policy update.

A microbatch is either rows, right-padded to its longest sequence, or packed: all tokens in one row, with the borders
between sequences (Megatron's THD form, which needs Transformer Engine on GPUs). How sequences are spread over
microbatches and data-parallel ranks changes no loss and no gradient beyond rounding: every weight is a share of the
global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.policy import PolicyMicrobatch
from megatron_oisd.rl.rollout.base import Rollout


@dataclass
class RolloutBatch:
    """The rollouts of one step, equal on every rank; rows are prompt-major, a prompt's samples side by side."""

    tokens: Tensor
    """``[B, s]`` prompt and response, right-padded."""
    mask: Tensor
    """``[B, s]`` bool: set at t where token t + 1 belongs to the response and is trained on."""
    rollout_log_probs: Tensor
    """``[B, s]`` log-probability the engine gave token t + 1; zero outside the responses."""
    advantages: Tensor
    """``[B]``."""
    lengths: Tensor
    """``[B]`` tokens of each sequence."""
    old_log_probs: Tensor | None = None
    """``[B, s]`` under the weights that sampled, computed by the trainer."""
    reference_log_probs: Tensor | None = None
    """``[B, s]`` under the reference model."""
    weights: Tensor | None = None
    """``[B, s]`` of :func:`~megatron_oisd.losses.aggregate.token_weights`; None: all 1."""
    importance: Tensor | None = None
    """``[B, s]`` of :func:`~megatron_oisd.losses.off_policy.truncated_importance`; None: all 1."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, rows: slice) -> RolloutBatch:
        """The rows of one mini-batch."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return RolloutBatch(**chosen)

    @property
    def num_sequences(self) -> int:
        """Sequences that have anything to train on."""
        return int(self.mask.any(1).sum())

    def microbatch(self, rows: Sequence[int], *, length: int, packed: bool, device: torch.device) -> PolicyMicrobatch:
        """One microbatch.

        Args:
            rows: indices into this batch.
            length: padded length of each row, or of the one packed row.
            packed: put the sequences one behind the other.
            device: where the tensors go that the model and the loss need; mask and advantages stay on the CPU.
        """
        chosen = list(rows)
        lengths = self.lengths[chosen].tolist()

        def fit(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            if packed:
                line = torch.cat([tensor[row, :count] for row, count in zip(chosen, lengths, strict=True)])
                return _fit(line.unsqueeze(0), length)
            return _fit(tensor[chosen], length)

        def moved(tensor: Tensor | None) -> Tensor | None:
            fitted = fit(tensor)
            return None if fitted is None else fitted.to(device)

        tokens, mask = fit(self.tokens), fit(self.mask)
        assert tokens is not None
        assert mask is not None
        return PolicyMicrobatch(
            tokens=tokens.to(device), mask=mask, advantages=self.advantages[chosen], sequence_ids=chosen,
            old_log_probs=moved(self.old_log_probs), reference_log_probs=moved(self.reference_log_probs),
            weights=moved(self.weights), importance=moved(self.importance), lengths=lengths if packed else None,
        )  # fmt: skip

    def unpack(self, microbatch: PolicyMicrobatch, values: Tensor, target: Tensor) -> None:
        """Write a microbatch's per-token ``values`` into ``target`` ``[B, s]``."""
        if microbatch.lengths is None:
            width = min(values.shape[1], target.shape[1])
            target[microbatch.sequence_ids, :width] = values[:, :width]
            return
        start = 0
        for row, count in zip(microbatch.sequence_ids, microbatch.lengths, strict=True):
            target[row, :count] = values[0, start : start + count]
            start += count


def plan_microbatches(
    lengths: Sequence[int], *, data_parallel: int, micro_batch_size: int, max_tokens: int | None, packed: bool
) -> list[list[list[int]]]:
    """Spread sequences over data-parallel ranks and microbatches; every rank gets as many microbatches.

    Args:
        lengths: tokens of each sequence.
        data_parallel: ranks.
        micro_batch_size: sequences per microbatch where there is no token budget.
        max_tokens: most tokens in a microbatch, padding included; sequences of like length come together. A sequence
            that is longer on its own is alone in its microbatch.
        packed: nothing is padded within a microbatch.

    Returns:
        ``[rank][microbatch]`` lists of indices.

    Raises:
        OISDError: there are fewer sequences than ranks, or they do not split evenly where there is no budget.
    """
    count = len(lengths)
    if max_tokens is None:
        if count % (data_parallel * micro_batch_size):
            raise OISDError(
                f"{count} sequences do not split into microbatches of {micro_batch_size} on {data_parallel} "
                "data-parallel ranks: change --micro-batch-size, or set --max-tokens-per-microbatch"
            )
        rows = [list(range(rank, count, data_parallel)) for rank in range(data_parallel)]
        size = micro_batch_size
        return [[mine[start : start + size] for start in range(0, len(mine), size)] for mine in rows]
    if count < data_parallel:
        raise OISDError(f"{count} sequences for {data_parallel} data-parallel ranks: each needs one")

    def cost(group: list[int]) -> int:
        return sum(lengths[i] for i in group) if packed else len(group) * max(lengths[i] for i in group)

    groups: list[list[int]] = []
    for index in sorted(range(count), key=lambda i: (-lengths[i], i)):
        if groups and cost([*groups[-1], index]) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    while len(groups) % data_parallel:  # the largest that can be halved
        splittable = [group for group in groups if len(group) > 1]
        if not splittable:
            raise OISDError(
                f"{count} sequences of up to {max(lengths)} tokens make {len(groups)} microbatches of at most "
                f"{max_tokens} tokens, which {data_parallel} data-parallel ranks cannot share: raise "
                "--max-tokens-per-microbatch"
            )
        largest = max(splittable, key=cost)
        place = groups.index(largest)
        half = len(largest) // 2
        groups[place : place + 1] = [largest[:half], largest[half:]]
    groups.sort(key=cost, reverse=True)
    ranks: list[list[list[int]]] = [[] for _ in range(data_parallel)]
    for place in range(0, len(groups), data_parallel):  # to and fro, so that no rank gets all the larger ones
        order = range(data_parallel) if place // data_parallel % 2 == 0 else reversed(range(data_parallel))
        for offset, rank in enumerate(order):
            ranks[rank].append(groups[place + offset])
    return ranks


def make_microbatches(
    batch: RolloutBatch,
    plan: Sequence[Sequence[int]],
    *,
    variable_length: bool,
    packed: bool,
    length_multiple: int,
    device: torch.device,
) -> list[PolicyMicrobatch]:
    """One rank's microbatches.

    Args:
        batch: the global mini-batch.
        plan: rows of each.
        variable_length: each is as long as it needs to be; otherwise all are as long as the batch's longest sequence.
        packed: see :meth:`RolloutBatch.microbatch`.
        length_multiple: lengths are rounded up to it (sequence parallelism shards the length).
        device: see there.
    """
    lengths = batch.lengths.tolist()
    everywhere = max(lengths)

    def length(rows: Sequence[int]) -> int:
        if packed:
            used = sum(lengths[row] for row in rows)
        else:
            used = max(lengths[row] for row in rows) if variable_length else everywhere
        return -(-used // length_multiple) * length_multiple

    return [batch.microbatch(rows, length=length(rows), packed=packed, device=device) for rows in plan]


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
    lengths = torch.zeros(len(rollouts), dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        prompt, response = len(rollout.prompt_ids), len(rollout.response_ids)
        lengths[row] = prompt + response
        tokens[row, : prompt + response] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        mask[row, prompt - 1 : prompt + response - 1] = True
        log_probs[row, prompt - 1 : prompt + response - 1] = torch.tensor(rollout.logprobs)
    return RolloutBatch(tokens, mask, log_probs, advantages, lengths)
