"""The policy update on Megatron's pipeline schedules: log-probability passes and GRPO + OISD gradient passes.

Shape legend as in :mod:`megatron_oisd.losses`; here tensors are batch first, ``[b, s]``, as Megatron's loss functions
see them. Position t of every ``[b, s]`` tensor speaks of the prediction made *at* t, that is of token t + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.losses.grpo import TokenStatistics, kl_penalty, policy_loss, vocab_parallel_log_probs
from megatron_oisd.losses.numerics import Group, group_size, valid_columns
from megatron_oisd.pipeline.oisd import OISD

METRICS = ("loss", "pg_loss", "pg_clipfrac", "ppo_kl", "entropy", "kl_loss", "tokens")


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """GRPO's knobs; the values of the paper's recipe are the defaults."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 10.0
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are those of the sampling distribution."""
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference model; above 0 microbatches need ``reference_log_probs``."""
    kl_estimator: str = "k3"
    """See :func:`~megatron_oisd.losses.grpo.kl_penalty`."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""


@dataclass
class PolicyMicrobatch:
    """One microbatch of rollouts, equal on every tensor- and pipeline-parallel rank.

    Rows, right-padded (b sequences), or packed (b = 1, n sequences one behind the other).
    """

    tokens: Tensor
    """``[b, s]`` token ids."""
    mask: Tensor
    """``[b, s]`` bool, on CPU: predictions of response tokens."""
    advantages: Tensor
    """One for each sequence, on CPU."""
    old_log_probs: Tensor | None
    """``[b, s]`` under the policy that sampled; None where that is the policy being updated, see ``gradients``."""
    sequence_ids: list[int]
    """Number of each sequence in the global batch."""
    reference_log_probs: Tensor | None = None
    """``[b, s]`` under the reference model, for the KL term."""
    weights: Tensor | None = None
    """``[b, s]`` weight of each token in the mean; None: all 1."""
    importance: Tensor | None = None
    """``[b, s]`` factor of each token's policy loss; None: all 1."""
    lengths: list[int] | None = None
    """Packed: tokens of each sequence."""

    @cached_property
    def packed_seq_params(self) -> Any:
        """Megatron's description of a packed microbatch, None for rows; padding at the end is a sequence of its own."""
        if self.lengths is None:
            return None
        from megatron.core.packed_seq_params import PackedSeqParams

        borders = [0, *accumulate(self._all_lengths)]
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=self.tokens.device)
        longest = max(self._all_lengths)
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )  # fmt: skip

    @property
    def _all_lengths(self) -> list[int]:
        assert self.lengths is not None
        rest = self.tokens.shape[1] - sum(self.lengths)
        return self.lengths + ([rest] if rest else [])

    @property
    def sequence_advantages(self) -> Tensor:
        """Advantages as OISD takes them, with one for the padding of a packed microbatch."""
        return self._with_padding(self.advantages, 0.0)

    @property
    def all_sequence_ids(self) -> list[int]:
        """Likewise."""
        return [int(i) for i in self._with_padding(torch.tensor(self.sequence_ids), 0)]

    def _with_padding(self, values: Tensor, fill: float) -> Tensor:
        if self.lengths is None or sum(self.lengths) == self.tokens.shape[1]:
            return values
        return torch.cat([values, values.new_full((1,), fill)])

    def token_advantages(self) -> Tensor:
        """``[b, s]``."""
        if self.lengths is None:
            return self.advantages.unsqueeze(1).expand(self.mask.shape)
        return self.sequence_advantages.repeat_interleave(torch.tensor(self._all_lengths)).unsqueeze(0)

    def position_ids(self) -> Tensor:
        """``[b, s]``, from 0 in every sequence."""
        rows, length = self.tokens.shape
        if self.lengths is None:
            return torch.arange(length, device=self.tokens.device).expand(rows, length)
        return torch.cat([torch.arange(n, device=self.tokens.device) for n in self._all_lengths]).unsqueeze(0)


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups of one rank; explicit, so that nothing below reads global state."""

    tp: Group = None
    pp: Group = None
    dp: Group = None

    @classmethod
    def from_megatron(cls) -> ParallelGroups:
        """Take them from Megatron's initialised parallel state."""
        from megatron.core import parallel_state

        return cls(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            dp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


class PolicyPass:
    """Runs microbatches through the pipeline.

    Args:
        chunks: this rank's model chunks, as the schedule is given them.
        model_config: Megatron's ``TransformerConfig``.
        oisd: attached to the same chunks, or None for plain GRPO.
        loss: GRPO's knobs.
        groups: process groups.
        vocab_size: true vocabulary size; rows beyond it are excluded from every softmax.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        model_config: Any,
        oisd: OISD | None,
        loss: PolicyLossConfig,
        groups: ParallelGroups,
        vocab_size: int,
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.chunks, self.model_config, self.oisd, self.loss, self.groups = chunks, model_config, oisd, loss, groups
        self.vocab_size = vocab_size
        self._schedule = get_forward_backward_func()

    def log_probs(self, microbatches: Sequence[PolicyMicrobatch]) -> list[Tensor]:
        """Log-probability of token t + 1 at every t under the current weights, without gradients.

        Returns:
            ``[b, s]`` for each microbatch, fp32, zero outside the mask, equal on every rank of the pipeline.
        """
        with torch.no_grad():
            store = self._run(microbatches, forward_only=True)
        return [self._from_last(microbatch, store[i : i + 1]) for i, microbatch in enumerate(microbatches)]

    def gradients(
        self,
        microbatches: Sequence[PolicyMicrobatch],
        *,
        num_sequences: int | None,
        num_tokens: int | None,
        step: int | None = None,
    ) -> dict[str, float]:
        """Accumulate the gradients of GRPO + OISD over the microbatches of one optimizer step.

        Args:
            microbatches: this data-parallel rank's; the same number on every rank. Those without ``old_log_probs`` are
                of the policy being updated: they get the log-probabilities of this pass, fp32, zero outside the mask.
            num_sequences: sequences of the global batch; None as in :meth:`OISD.step`.
            num_tokens: response tokens of the global batch; likewise.
            step: number of the optimizer step; None: counted since OISD was attached.

        Returns:
            GRPO's metrics, means over the response tokens of the global batch, equal on every rank.
        """
        context = (
            nullcontext()
            if self.oisd is None
            else self.oisd.step(
                num_microbatches=len(microbatches), num_sequences=num_sequences, num_tokens=num_tokens, step=step
            )
        )
        with context:
            store = self._run(microbatches, forward_only=False)
        total = torch.zeros(len(METRICS), device=self._device)
        if store:
            total = torch.stack([metrics for metrics, _ in store]).sum(0)
        self._broadcast_from_last(total)
        for index, microbatch in enumerate(microbatches):
            if microbatch.old_log_probs is None:
                microbatch.old_log_probs = self._from_last(microbatch, [own for _, own in store[index : index + 1]])
        if group_size(self.groups.dp) > 1:
            dist.all_reduce(total, group=self.groups.dp)
        *sums, tokens = total.tolist()
        return {name: value / max(tokens, 1.0) for name, value in zip(METRICS, sums, strict=False)}

    @property
    def _device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device

    def _from_last(self, microbatch: PolicyMicrobatch, computed: Sequence[Tensor]) -> Tensor:
        """A microbatch's log-probabilities on every rank of the pipeline, which only the last ``computed``."""
        values = computed[0].float() if computed else torch.zeros(microbatch.tokens.shape, device=self._device)
        self._broadcast_from_last(values)
        return values

    def _broadcast_from_last(self, tensor: Tensor) -> None:
        group = self.groups.pp
        if group is not None and group.size() > 1:
            dist.broadcast(tensor, src=dist.get_process_group_ranks(group)[-1], group=group)

    def _run(self, microbatches: Sequence[PolicyMicrobatch], *, forward_only: bool) -> list[Any]:
        rows, length = microbatches[0].tokens.shape
        iterators: list[Iterator[PolicyMicrobatch]] = [iter(microbatches) for _ in self.chunks]
        single = len(self.chunks) == 1
        return self._schedule(
            forward_step_func=partial(self._forward_step, log_probs_only=forward_only),
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _forward_step(
        self, data_iterator: Iterator[PolicyMicrobatch], model: nn.Module, *, log_probs_only: bool
    ) -> tuple[Tensor, Any]:
        batch = next(data_iterator)
        packed = batch.packed_seq_params
        context = (
            nullcontext()
            if self.oisd is None or log_probs_only
            else self.oisd.microbatch(
                model, loss_mask=batch.mask, advantages=batch.sequence_advantages, sequence_ids=batch.all_sequence_ids,
                packed_seq_params=packed,
            )
        )  # fmt: skip
        extra = {} if packed is None else {"packed_seq_params": packed}
        with context:
            output = model(batch.tokens, batch.position_ids(), None, **extra)
        return output, partial(self._collect_log_probs if log_probs_only else self._loss, batch)

    def _token_statistics(self, batch: PolicyMicrobatch, logits: Tensor) -> tuple[TokenStatistics, Tensor]:
        """Statistics of the response tokens ``[N]`` and the mask on the logits' device."""
        mask = batch.mask.to(logits.device)
        targets = torch.roll(batch.tokens, -1, dims=1)
        width = logits.shape[-1]
        rank = 0 if self.groups.tp is None else self.groups.tp.rank()
        statistics = vocab_parallel_log_probs(
            logits[mask],
            targets[mask],
            group=self.groups.tp,
            temperature=self.loss.temperature,
            first_token=rank * width,
            valid_columns=valid_columns(self.vocab_size, rank, width),
            entropy_gradient=self.loss.entropy_coefficient != 0,
        )
        return statistics, mask

    def _collect_log_probs(self, batch: PolicyMicrobatch, logits: Tensor, non_loss_data: bool = True) -> Tensor:
        statistics, mask = self._token_statistics(batch, logits)
        return _in_place(statistics.log_probs, mask)

    def _loss(self, batch: PolicyMicrobatch, logits: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:
        """Sum over the microbatch's response tokens; Megatron divides by the global count (token mean)."""
        statistics, mask = self._token_statistics(batch, logits)
        own = _in_place(statistics.log_probs.detach(), mask) if batch.old_log_probs is None else None
        old = statistics.log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs[mask]
        advantages = batch.token_advantages().to(logits.device)[mask]
        result = policy_loss(
            statistics.log_probs,
            old,
            advantages,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            dual_clip=self.loss.dual_clip,
        )
        policy = result.loss if batch.importance is None else result.loss * batch.importance[mask]
        total, kl = policy, torch.zeros_like(policy)
        if self.loss.kl_coefficient:
            assert batch.reference_log_probs is not None
            kl = kl_penalty(statistics.log_probs, batch.reference_log_probs[mask], self.loss.kl_estimator)
            total = total + self.loss.kl_coefficient * kl
        if self.loss.entropy_coefficient:
            total = total - self.loss.entropy_coefficient * statistics.entropy
        weights = None if batch.weights is None else batch.weights[mask]
        loss = _weighted_sum(total, weights)
        num_tokens = mask.sum().to(torch.int)
        with torch.no_grad():
            sums = [
                loss, _weighted_sum(policy, weights), result.clipped.sum(), result.kl.sum(), statistics.entropy.sum(),
                _weighted_sum(kl, weights), num_tokens,
            ]  # fmt: skip
            metrics = torch.stack([value.float() for value in sums])
        return loss.clone(), num_tokens, (metrics, own)


def _in_place(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` of the tokens in the mask, fp32, zero elsewhere."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=values.device).masked_scatter_(mask, values.float())


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.sum() if weights is None else (values * weights).sum()
