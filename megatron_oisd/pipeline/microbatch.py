"""What one microbatch means for OISD on this stage: its tokens, their weights, its sampled attention queries.

Everything is worked out from the whole microbatch (mask and advantages of all positions), on the CPU, the same on every
stage and context-parallel rank; a rank then keeps the positions that it holds. ``s`` is the whole sequence length here,
``s_local`` what a context-parallel rank holds of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.advantage import alignment_weight
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
    """Ranks that Megatron averages over, those of context parallelism included."""
    num_sequences: int | None
    """Sequences in the global batch, over all data-parallel ranks and microbatches; None: unknown."""
    num_tokens: int | None
    """Response tokens in the global batch, as the loss function reports them to Megatron; None: unknown."""
    context_parallel_size: int = 1
    """Ranks that share the positions of one sequence."""

    def factor(self, tokens: Tensor, aggregation: str) -> float:
        """Coefficient of a position beyond its share (:func:`_shares`), its weight and lambda.

        Args:
            tokens: ``[n]`` response tokens of each sequence of this microbatch.
            aggregation: ``"sequence"`` or ``"token"``.
        """
        # Megatron's average over context-parallel ranks divides what is a sum over them.
        alone = self.context_parallel_size / self.num_microbatches
        if aggregation == "token":
            if self.per_token_loss:
                return 1.0
            if self.num_tokens is not None:
                return self.data_parallel_size / self.num_tokens
            return alone / max(float(tokens.sum()), 1.0)
        if self.num_sequences is None:
            return alone / max(int((tokens > 0).sum()), 1)
        scale = (self.num_tokens or 0) if self.per_token_loss else self.data_parallel_size
        return scale / self.num_sequences

    def metric_scale(self, aggregation: str, tokens: int) -> tuple[float, float]:
        """(factor, count): how a microbatch's gradient coefficients become its part of the reported loss.

        The loss is ``sum(factor * coefficient * value) / sum(count)`` over microbatches, steps and ranks.

        Args:
            aggregation: ``"sequence"`` or ``"token"``.
            tokens: response tokens of the microbatch.
        """
        if self.per_token_loss and self.num_tokens is None:
            assert aggregation == "token"
            return 1.0, tokens / self.context_parallel_size
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


@dataclass(frozen=True)
class Shards:
    """How the positions of a microbatch lie on the ranks of one stage."""

    tensor_size: int = 1
    tensor_rank: int = 0
    sequence_parallel: bool = False
    """Whether hidden states are sharded along the sequence over the tensor-parallel ranks."""
    context_size: int = 1
    context_rank: int = 0


@dataclass(eq=False)
class Microbatch:
    """One microbatch on one model chunk, from its forward to its last injected gradient."""

    index: int
    """Number of the microbatch on its chunk in this step, from 0; backward visits them in the same order."""
    shape: tuple[int, int]
    """(s_local, b)."""
    packed: bool
    """Whether several sequences are packed into its one row."""
    tokens: Tensor
    """``[N]`` positions of the computed tokens in ``[s_local * b]``, ascending."""
    bounds: list[int]
    """Rows of ``tokens`` by tensor-parallel rank, ``tp + 1`` borders: those whose hidden states the rank holds under
    sequence parallelism, else equal parts. By them the rows of a message are shared out among the ranks."""
    coefficients: Tensor
    """``[N]`` gradient coefficient, w_t included, lambda not."""
    shares: Tensor
    """``[N]`` share of each token in the reported mean's numerator."""
    sample: QuerySample | None
    """Sampled queries of this rank, with positions in ``s_local`` and keys in ``s``; None without attention
    alignment."""
    attn_coefficients: Tensor
    attn_shares: Tensor
    context_order: Tensor | None
    """``[s]`` where position i stands among the context-parallel ranks' positions one after another; None without."""
    fingerprint: int
    """Of step, tokens and weights: equal on every stage that was given the same mask and advantages."""
    metric_factor: float
    metric_count: float
    """See :meth:`StepScale.metric_scale`."""
    pending: set[tuple[str, int]] = field(default_factory=set)
    """Student taps of this chunk whose gradient is still to come."""
    captured: dict[str, list[Tensor]] = field(default_factory=dict)
    """Teachers that this chunk's forward has made so far, by kind."""

    def share(self, tensor_rank: int) -> slice:
        """Rows of ``tokens`` that a tensor-parallel rank holds or sends, from ``bounds``."""
        return slice(self.bounds[tensor_rank], self.bounds[tensor_rank + 1])


def packed_borders(packed_seq_params: Any) -> list[int]:
    """Borders of the packed sequences in rows of the tensors, from Megatron's ``PackedSeqParams``."""
    borders = packed_seq_params.cu_seqlens_q_padded
    if borders is None:
        borders = packed_seq_params.cu_seqlens_q
    return [int(border) for border in borders.tolist()]


def make_microbatch(
    index: int,
    config: OISDConfig,
    scale: StepScale,
    *,
    loss_mask: Tensor,
    advantages: Tensor,
    step: int,
    sequence_ids: Sequence[int] | None,
    first_id: int,
    device: torch.device,
    shards: Shards | None = None,
    borders: list[int] | None = None,
    sliding_window: tuple[int, int] | None = None,
) -> Microbatch:
    """Work out tokens, weights and sampled queries; the same on every stage, since each has mask and advantages.

    Args:
        index: see :class:`Microbatch`.
        config: OISD's configuration.
        scale: of the step.
        loss_mask: ``[b, s]``, or ``[1, s]`` packed.
        advantages: ``[b]`` (``[n]`` for n packed sequences) or ``[b, s]``.
        step: number of the optimizer step.
        sequence_ids: names of the sequences in the global batch; None: counted from ``first_id``.
        first_id: see there.
        device: of the model.
        shards: the layout; None: everything is on this rank.
        borders: of packed sequences, from :func:`packed_borders`.
        sliding_window: attention window that all compared layers share.

    Raises:
        OISDError: shapes do not fit together.
    """
    shards = shards or Shards()
    if loss_mask.dim() != 2:
        raise OISDError(f"loss_mask has shape {list(loss_mask.shape)}: expected [sequences, positions]")
    num_rows, length = loss_mask.shape
    mask = loss_mask.to("cpu") > 0
    segments = _segments(mask, borders)
    num_sequences = num_rows if borders is None else len(borders) - 1
    weights = alignment_weight(
        _spread_advantages(advantages.to("cpu", torch.float32), mask, segments, borders),
        config.advantage_clip, config.advantage_weighting,
    )  # fmt: skip
    if sequence_ids is None:
        sequence_ids = range(first_id, first_id + num_sequences)
    if borders is None and len(sequence_ids) != num_rows:
        raise OISDError(f"{len(sequence_ids)} sequence_ids for {num_rows} sequences: expected one for each")
    tokens = _count(mask, segments, num_sequences)
    factor = scale.factor(tokens, config.aggregation)
    shares = _shares(mask, tokens, segments, num_sequences, config.aggregation)
    coefficients = shares * factor * weights
    # Tokens without weight have neither loss nor gradient: they are neither computed nor sent.
    active = mask & (weights != 0)
    positions = context_positions(length, borders, shards.context_size)
    mine = positions[shards.context_rank]
    order = active[:, mine].t().reshape(-1).nonzero().flatten()

    def pick(values: Tensor, where: Tensor) -> Tensor:
        return values[:, mine].t().reshape(-1)[where].to(device)

    sample, queries = None, order[:0]
    attn_coefficients = attn_shares = torch.zeros_like(weights)
    if config.lambda_attn > 0:
        cu_seqlens = None if borders is None else torch.tensor(borders)
        try:
            chosen = sample_query_positions(
                mask, num_queries=config.attn_queries, seed=config.seed, step=step, sequence_ids=list(sequence_ids),
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
        except ValueError as error:
            raise OISDError(str(error)) from None
        attn_shares = _shares(chosen, tokens, segments, num_sequences, config.aggregation)
        attn_coefficients = attn_shares * factor * weights
        here = torch.zeros_like(chosen)
        here[:, mine] = (chosen & active)[:, mine]
        sample = sample_keys(
            here, window=config.attn_window, num_global=config.attn_global_keys, cu_seqlens=cu_seqlens,
            sliding_window=sliding_window,
        )  # fmt: skip
        local = torch.empty(length, dtype=torch.long)
        local[mine] = torch.arange(len(mine))
        sample = QuerySample(local[sample.position], sample.sequence, sample.keys, sample.valid)
        queries = sample.position * num_rows + sample.sequence
        sample = sample.to(device)
    metric_factor, metric_count = scale.metric_scale(config.aggregation, int(tokens.sum()))
    what = weights.masked_fill(~mask, 0.0).numpy().tobytes() + repr(borders).encode()
    return Microbatch(
        index=index,
        shape=(len(mine), num_rows),
        packed=borders is not None,
        tokens=order.to(device),
        bounds=_bounds(order, len(mine) * num_rows, shards),
        coefficients=pick(coefficients, order),
        shares=pick(shares, order),
        sample=sample,
        attn_coefficients=pick(attn_coefficients, queries),
        attn_shares=pick(attn_shares, queries),
        context_order=None if len(positions) == 1 else torch.cat(positions).argsort().to(device),
        fingerprint=zlib.crc32(what, step & 0xFFFFFFFF),
        metric_factor=metric_factor,
        metric_count=metric_count,
    )


def context_positions(length: int, borders: list[int] | None, context_size: int) -> list[Tensor]:
    """Positions that each context-parallel rank holds, in its own order.

    Megatron cuts every sequence into ``2 * cp`` equal parts and gives rank r the parts r and ``2 * cp - 1 - r``, which
    balances causal attention.

    Raises:
        OISDError: a sequence does not divide into ``2 * cp`` parts.
    """
    if context_size == 1:
        return [torch.arange(length)]
    result: list[list[Tensor]] = [[] for _ in range(context_size)]
    for first, stop in pairwise([0, length] if borders is None else [*borders, length]):
        if (stop - first) % (2 * context_size):
            raise OISDError(
                f"a sequence of {stop - first} positions does not divide into 2 x context_parallel_size = "
                f"{2 * context_size} parts: pad sequences to a multiple of {2 * context_size}"
            )
        parts = torch.arange(first, stop).chunk(2 * context_size) if stop > first else ()
        for rank in range(context_size if parts else 0):
            result[rank] += [parts[rank], parts[-1 - rank]]
    return [torch.cat(parts) for parts in result]


def _segments(mask: Tensor, borders: list[int] | None) -> Tensor:
    """``[b, s]`` number of the sequence that each position belongs to; the positions after the last border get the
    number of sequences."""
    num_rows, length = mask.shape
    if borders is None:
        return torch.arange(num_rows).unsqueeze(1).expand(num_rows, length)
    if num_rows != 1:
        raise OISDError(f"loss_mask has {num_rows} rows: packed sequences stand in one row, [1, t]")
    if len(borders) < 2 or borders[0] != 0 or borders[-1] > length or any(a > b for a, b in pairwise(borders)):
        raise OISDError(f"cu_seqlens is {borders}: expected borders that rise from 0 to at most {length}")
    if mask[0, borders[-1] :].any():
        raise OISDError(f"loss_mask is set after cu_seqlens ends at {borders[-1]}: every token needs its sequence")
    return torch.searchsorted(torch.tensor(borders[1:]), torch.arange(length), right=True).unsqueeze(0)


def _spread_advantages(advantages: Tensor, mask: Tensor, segments: Tensor, borders: list[int] | None) -> Tensor:
    """``[b, s]`` advantage of every position."""
    if advantages.shape == mask.shape:
        return advantages
    if borders is None:
        if advantages.shape == mask.shape[:1]:
            return advantages.unsqueeze(1).expand(mask.shape)
        expected = f"[{mask.shape[0]}]"
    else:
        # Megatron repeats the last border: behind the named sequences come empty ones and padding.
        if advantages.dim() == 1 and len(advantages) <= len(borders) - 1:
            behind = torch.zeros(len(borders) - len(advantages))
            spread = torch.cat([advantages, behind])[segments]
            if not (mask & (segments >= len(advantages))).any():
                return spread
        expected = "one for each packed sequence that has a masked position"
    raise OISDError(
        f"advantages has shape {list(advantages.shape)}: expected {expected} or {list(mask.shape)} to go with "
        f"loss_mask {list(mask.shape)}"
    )


def _count(where: Tensor, segments: Tensor, num_sequences: int) -> Tensor:
    """Positions of each sequence where ``where`` is set: ``[n]`` fp32."""
    return torch.bincount(segments[where], minlength=num_sequences)[:num_sequences].float()


def _shares(where: Tensor, tokens: Tensor, segments: Tensor, num_sequences: int, aggregation: str) -> Tensor:
    """Share of each position in the numerator of the mean over sequences or tokens.

    Args:
        where: ``[b, s]`` bool, the positions the mean is taken over: all response positions or the sampled queries.
        tokens: ``[n]`` response tokens of each sequence.
        segments: ``[b, s]`` sequence of each position.
        num_sequences: n.
        aggregation: ``"sequence"`` or ``"token"``.

    Returns:
        ``[b, s]`` fp32, zero outside ``where``.
    """
    # A sampled query stands for tokens / queries positions, so that sampling leaves a token mean unbiased.
    numerator = tokens if aggregation == "token" else torch.ones(num_sequences)
    share = numerator / _count(where, segments, num_sequences).clamp_min(1.0)
    return where.float() * torch.cat([share, torch.zeros(1)])[segments]


def _bounds(order: Tensor, size: int, shards: Shards) -> list[int]:
    """See :attr:`Microbatch.bounds`; ``size`` counts all positions of this rank."""
    number = len(order)
    if shards.sequence_parallel:
        if size % shards.tensor_size:
            raise OISDError(
                f"{size} positions do not divide over {shards.tensor_size} sequence-parallel ranks: pad the sequences"
            )
        edges = torch.arange(shards.tensor_size + 1) * (size // shards.tensor_size)
        return torch.searchsorted(order, edges).tolist()
    part = -(-number // shards.tensor_size)
    return [min(rank * part, number) for rank in range(shards.tensor_size + 1)]
