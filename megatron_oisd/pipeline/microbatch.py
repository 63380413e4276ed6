"""What one microbatch means for OISD on this stage: its tokens, their weights, its sampled attention queries."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.advantage import signed_weight
from megatron_oisd.losses.attention import QuerySample, sample_keys, sample_query_positions


@dataclass(frozen=True)
class StepScale:
    """Turns per-token values into gradients that Megatron's own later scaling makes a mean over the global batch.

    Megatron divides every gradient by the global token count when ``calculate_per_token_loss`` is on, and averages over
    data-parallel ranks when it is off; the injected gradient must carry the inverse of that.
    """

    per_token_loss: bool
    """Megatron's ``calculate_per_token_loss``."""
    num_microbatches: int
    data_parallel_size: int
    num_sequences: int | None
    """Sequences in the global batch, over all data-parallel ranks and microbatches; None: unknown."""
    num_tokens: int | None
    """Response tokens in the global batch, as the loss function reports them to Megatron; None: unknown."""

    def coefficients(self, shares: Tensor, mask: Tensor, aggregation: str) -> Tensor:
        """Weight of each position before the advantage and lambda.

        Args:
            shares: ``[b, s]`` from :func:`_shares`.
            mask: ``[b, s]`` bool, response positions of this microbatch.
            aggregation: ``"sequence"`` or ``"token"``.

        Returns:
            ``[b, s]`` fp32, zero where the shares are.
        """
        tokens = mask.float().sum(1)
        if aggregation == "token":
            if self.per_token_loss:
                return shares
            if self.num_tokens is not None:
                return shares * (self.data_parallel_size / self.num_tokens)
            return shares / (tokens.sum().clamp_min(1.0) * self.num_microbatches)
        if self.num_sequences is None:
            sequences = (tokens > 0).float().sum().clamp_min(1.0)
            return shares / (sequences * self.num_microbatches)
        scale = (self.num_tokens or 0) if self.per_token_loss else self.data_parallel_size
        return shares * (scale / self.num_sequences)

    def metric_scale(self, aggregation: str, tokens: int) -> tuple[float, float]:
        """(factor, count): how a microbatch's gradient coefficients become its part of the reported loss.

        The loss is ``sum(factor * coefficient * value) / sum(count)`` over microbatches, steps and ranks.

        Args:
            aggregation: ``"sequence"`` or ``"token"``.
            tokens: response tokens of the microbatch.
        """
        if self.per_token_loss and self.num_tokens is None:
            assert aggregation == "token"
            return 1.0, float(tokens)
        scale = (self.num_tokens or 1) if self.per_token_loss else self.data_parallel_size
        # The counts of a step's microbatches and data-parallel ranks add up to 1.
        return 1.0 / scale, 1.0 / (self.num_microbatches * self.data_parallel_size)

    def check(self, aggregation: str) -> None:
        """Raise :class:`OISDError` where the aggregation needs counts of the global batch that were not given."""
        for name in ("num_microbatches", "num_sequences", "num_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OISDError(f"{name} is {value}: expected at least 1")
        if aggregation == "sequence" and self.per_token_loss and None in (self.num_sequences, self.num_tokens):
            raise OISDError(
                "aggregation 'sequence' with calculate_per_token_loss needs the global batch's num_sequences and "
                "num_tokens: pass both to OISD.step(), or set aggregation='token'"
            )


@dataclass(eq=False)
class Microbatch:
    """One microbatch on one model chunk, from its forward to its last injected gradient."""

    index: int
    """Number of the microbatch on its chunk in this step, from 0; backward visits them in the same order."""
    shape: tuple[int, int]
    """(s, b), s the full sequence length."""
    tokens: Tensor
    """``[N]`` positions of the computed tokens in ``[s * b]``."""
    coefficients: Tensor
    """``[N]`` gradient coefficient, w_t included, lambda not."""
    shares: Tensor
    """``[N]`` share of each token in the reported mean's numerator."""
    sample: QuerySample | None
    """Sampled queries, None where attention alignment is off."""
    attn_coefficients: Tensor
    attn_shares: Tensor
    fingerprint: int
    """Of step, tokens and weights: equal on every stage that was given the same mask and advantages."""
    metric_factor: float
    metric_count: float
    """See :meth:`StepScale.metric_scale`."""
    pending: set[tuple[str, int]] = field(default_factory=set)
    """Student taps of this chunk whose gradient is still to come."""
    teacher_hidden: Tensor | None = None
    teacher_scores: Tensor | None = None


def make_microbatch(
    index: int,
    config: OISDConfig,
    scale: StepScale,
    *,
    loss_mask: Tensor,
    advantages: Tensor,
    step: int,
    sequence_ids: Sequence[int],
    device: torch.device,
) -> Microbatch:
    """Work out tokens, weights and sampled queries; the same on every stage, since each has mask and advantages.

    Raises:
        OISDError: shapes do not fit together.
    """
    if loss_mask.dim() != 2:
        raise OISDError(f"loss_mask has shape {list(loss_mask.shape)}: expected [sequences, positions]")
    num_rows, length = loss_mask.shape
    if advantages.shape == (num_rows,):
        advantages = advantages.unsqueeze(1).expand(num_rows, length)
    if advantages.shape != (num_rows, length):
        raise OISDError(
            f"advantages has shape {list(advantages.shape)}: expected [{num_rows}] or [{num_rows}, {length}] to go "
            f"with loss_mask {[num_rows, length]}"
        )
    if len(sequence_ids) != num_rows:
        raise OISDError(f"{len(sequence_ids)} sequence_ids for {num_rows} sequences: expected one for each")
    mask = loss_mask.to("cpu") > 0
    weights = signed_weight(advantages.to("cpu", torch.float32), config.advantage_clip)
    shares = _shares(mask, mask, config.aggregation)
    coefficients = scale.coefficients(shares, mask, config.aggregation) * weights
    # Tokens without weight have neither loss nor gradient: they are neither computed nor sent.
    active = mask & (weights != 0)
    order = active.t().reshape(-1).nonzero().flatten()

    def pick(values: Tensor, where: Tensor) -> Tensor:
        return values.t().reshape(-1)[where].to(device)

    sample, queries = None, order[:0]
    attn_coefficients = attn_shares = torch.zeros_like(weights)
    if config.lambda_attn > 0:
        chosen = sample_query_positions(
            mask, num_queries=config.attn_queries, seed=config.seed, step=step, sequence_ids=list(sequence_ids)
        )
        attn_shares = _shares(mask, chosen, config.aggregation)
        attn_coefficients = scale.coefficients(attn_shares, mask, config.aggregation) * weights
        sample = sample_keys(chosen & active, window=config.attn_window, num_global=config.attn_global_keys)
        queries = sample.position * num_rows + sample.sequence
        sample = sample.to(device)
    metric_factor, metric_count = scale.metric_scale(config.aggregation, int(mask.sum()))
    return Microbatch(
        index=index,
        shape=(length, num_rows),
        tokens=order.to(device),
        coefficients=pick(coefficients, order),
        shares=pick(shares, order),
        sample=sample,
        attn_coefficients=pick(attn_coefficients, queries),
        attn_shares=pick(attn_shares, queries),
        fingerprint=zlib.crc32(weights.masked_fill(~mask, 0.0).numpy().tobytes(), step & 0xFFFFFFFF),
        metric_factor=metric_factor,
        metric_count=metric_count,
    )


def _shares(mask: Tensor, where: Tensor, aggregation: str) -> Tensor:
    """Share of each position in the numerator of the mean over sequences or tokens.

    Args:
        mask: ``[b, s]`` bool, response positions.
        where: ``[b, s]`` bool, the positions the mean is taken over (a subset for sampled queries).
        aggregation: ``"sequence"`` or ``"token"``.

    Returns:
        ``[b, s]`` fp32, zero outside ``where``.
    """
    positions = where.float()
    per_sequence = positions.sum(1, keepdim=True).clamp_min(1.0)
    if aggregation == "sequence":
        return positions / per_sequence
    # A sampled query stands for tokens / queries positions, so that sampling leaves a token mean unbiased.
    return positions * mask.float().sum(1, keepdim=True) / per_sequence
