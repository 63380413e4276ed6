r"""Sampled-key attention alignment (OISD, "where to look").

For a sampled query position t, query head j of the student layer is compared with query head j of the last layer. Both
attention distributions are softmaxed over the *same* sampled set of causal keys of t. With ``first`` the first key that
t may see (the start of its own sequence, or of its sliding window where that is later), the set is:

* a window: the newest ``window`` positions ``t, t-1, ...`` that are not before ``first``;
* ``num_global`` equally spaced positions ``first + floor(g * old / num_global)`` among the ``old`` positions from
  ``first`` up to the window (all of them where there are no more than ``num_global``), so that ``first`` itself, the
  attention sink of a sequence without sliding window, is always included.

Formula, H the query heads over all ranks, s the softmax scale, S_t the key set, head j using key head g(j):

    z_tjk = s q_tj . k_k,g(j)       a_tj = softmax of z_tj over k in S_t
    L_attn = sum_t c_t * (1/H) sum_j JS(a_tj, sg(b_tj))

with b the last layer's distribution and c_t every factor of query t (signed advantage, means). Gradient:

    G_tjk    = c_t / H * a_tjk / 2 * (log(a_tjk / m_tjk) - KL(a_tj || m_tj)),   m = (a + b) / 2
    dL/dq_tj = s sum_k G_tjk k_k,g(j)           dL/dk_k,g = s sum_t sum_{j: g(j) = g} G_tjk q_tj

Only queries and keys are needed, never attention probabilities, so any attention backend will do. ``d`` is whatever
query and key share: for multi-latent attention the qk head dimension plus the RoPE part (192), with ``ng = np``. Packed
(THD) tensors ``[t, np, d]`` are passed as ``[t, 1, np, d]``. Everything is local to this rank's heads: no function here
has a collective. Shape legend: see :mod:`megatron_oisd.losses`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_oisd.losses.js import vocab_parallel_js
from megatron_oisd.losses.numerics import upcast


@dataclass(frozen=True)
class QuerySample:
    """Sampled query positions and their causal keys; equal on every rank and for every layer."""

    position: Tensor
    """``[Q]`` index of the query along ``s``."""
    sequence: Tensor
    """``[Q]`` index of the query along ``b``."""
    keys: Tensor
    """``[Q, K]`` indices of the keys along ``s``; entries that are not valid hold the query's own position, so that
    nothing outside the query's sequence is ever read."""
    valid: Tensor
    """``[Q, K]`` which entries of ``keys`` are there."""

    def to(self, device: torch.device) -> QuerySample:
        """Copy to ``device``."""
        return QuerySample(*(part.to(device) for part in (self.position, self.sequence, self.keys, self.valid)))


@dataclass(frozen=True)
class AttentionLoss:
    """What :func:`attention_alignment` returns."""

    values: Tensor
    """``[Q]`` this rank's share of the mean over heads of each query's unweighted divergence, nats."""
    query_gradient: Tensor
    """``[s, b, np, d]`` gradient of ``sum(coefficients * values)``, in the query's dtype."""
    key_gradient: Tensor
    """``[s, b, ng, d]`` likewise, in the key's dtype."""


# ----------------------------------------------------------------------------------------------- which queries and keys


def sample_query_positions(
    mask: Tensor, *, num_queries: int, seed: int, step: int, sequence_ids: list[int], cu_seqlens: Tensor | None = None
) -> Tensor:
    """Choose at most ``num_queries`` positions of each sequence where ``mask`` is set.

    The choice depends on (seed, step, the sequence's own id) alone: not on the rank, the microbatch it fell into, its
    place in a packed row or the layer, so student and teacher agree without talking and results do not depend on the
    parallel layout.

    Args:
        mask: ``[b, s]`` bool, on CPU.
        num_queries: positions per sequence at most; sequences with fewer use all of theirs.
        seed: run seed.
        step: number of the optimizer step.
        sequence_ids: integers that name the sequences: ``b`` of them, or one for each packed sequence.
        cu_seqlens: ``[n + 1]`` borders of the sequences packed into the one row of ``mask``. Borders beyond the named
            sequences (Megatron repeats the last one and adds a slot for padding) are allowed where ``mask`` is unset.

    Returns:
        ``[b, s]`` bool on CPU, the chosen positions.

    Raises:
        ValueError: the ids do not name every sequence that has a masked position.
    """
    chosen = mask.clone()
    if cu_seqlens is None:
        sequences = list(chosen)
    else:
        borders = _borders(cu_seqlens, mask)
        sequences = [chosen[0, first:stop] for first, stop in pairwise(borders)][: len(sequence_ids)]
        if mask[0, borders[len(sequences)] :].any():
            raise ValueError(
                f"mask is set at or after position {borders[len(sequences)]}, behind the last of the "
                f"{len(sequence_ids)} sequences in sequence_ids: name every packed sequence"
            )
    if len(sequence_ids) != len(sequences):
        raise ValueError(f"{len(sequence_ids)} sequence_ids for {len(sequences)} sequences: expected one for each")
    for own, identity in zip(sequences, sequence_ids, strict=True):
        positions = own.nonzero().flatten()
        if len(positions) <= num_queries:
            continue
        generator = torch.Generator().manual_seed(_mix(seed, step, identity))
        order = torch.randperm(len(positions), generator=generator)
        own[positions[order[num_queries:]]] = False
    return chosen


def _mix(*values: int) -> int:
    """Hash integers to a seed (splitmix64 steps), so that neighbouring seeds, steps and ids do not collide."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def sample_keys(
    chosen: Tensor,
    *,
    window: int,
    num_global: int,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: tuple[int, int] | None = None,
) -> QuerySample:
    """List the sampled causal keys of every chosen query, newest first, then the global ones from the oldest on.

    Args:
        chosen: ``[b, s]`` bool, the query positions.
        window: newest keys.
        num_global: equally spaced older keys.
        starts: ``[b]`` first position of each row's sequence (left-padded rows); None: 0.
        cu_seqlens: ``[n + 1]`` borders of the sequences packed into the one row of ``chosen``, in rows of the tensors:
            with padding between sequences Megatron's ``cu_seqlens_q_padded``. None: every row is one sequence.
        sliding_window: Megatron's ``window_size``: query t attends to ``t - left ... t + right``, both ends included,
            -1 for no limit. Only ``left`` matters, since no key after the query is ever sampled. Student and teacher
            are compared on one key set, so where their windows differ pass :func:`common_sliding_window` of both.

    Returns:
        The sample, on the device of ``chosen``, ``K = window + num_global``.

    Raises:
        ValueError: ``starts`` and ``cu_seqlens`` at once, a chosen query outside every sequence, malformed borders or
            windows.
    """
    sequence, position = chosen.nonzero(as_tuple=True)
    first = _sequence_starts(chosen, sequence, position, starts, cu_seqlens)
    if sliding_window is not None:
        left, right = sliding_window
        if min(left, right) < -1:
            raise ValueError(
                f"sliding_window is {sliding_window}: expected (left, right) of at least 0, -1 for no limit"
            )
        if left >= 0:
            first = torch.maximum(first, position - left)
    first, query = first.unsqueeze(1), position.unsqueeze(1)
    newest = query - torch.arange(window, device=chosen.device)
    old = (query + 1 - window - first).clamp_min(0)
    index = torch.arange(num_global, device=chosen.device).expand(len(position), -1)
    spaced = first + torch.where(old > num_global, index * old // max(num_global, 1), index)
    valid = torch.cat([newest >= first, index < old], dim=1)
    return QuerySample(position, sequence, torch.where(valid, torch.cat([newest, spaced], dim=1), query), valid)


def common_sliding_window(*windows: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the window that holds the keys visible under each of ``windows`` (Megatron's ``window_size``; None: all).

    Student and teacher layer may have different windows (``window_attn_skip_freq``); a key that one of them cannot see
    has no attention to compare, so both are compared on the intersection.
    """
    lefts = [window[0] for window in windows if window is not None and window[0] >= 0]
    return (min(lefts), 0) if lefts else None


def _sequence_starts(
    chosen: Tensor, sequence: Tensor, position: Tensor, starts: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Start of each query's own sequence: ``[Q]``."""
    if cu_seqlens is not None:
        if starts is not None:
            raise ValueError("starts and cu_seqlens were both given: a packed row's sequences start at its borders")
        borders = torch.tensor(_borders(cu_seqlens, chosen), device=chosen.device)
        if (position >= borders[-1]).any():
            raise ValueError(f"position {int(position.max())} is chosen but cu_seqlens ends at {int(borders[-1])}")
        return borders[torch.searchsorted(borders, position, right=True) - 1]
    if starts is None:
        return torch.zeros_like(position)
    if starts.shape != chosen.shape[:1]:
        raise ValueError(f"starts has shape {list(starts.shape)}: expected [{chosen.shape[0]}], one for each row")
    first = starts.to(chosen.device, torch.long)[sequence]
    if (first < 0).any() or (position < first).any():
        raise ValueError(f"starts is {starts.tolist()}: negative, or after a chosen position of its row")
    return first


def _borders(cu_seqlens: Tensor, row: Tensor) -> list[int]:
    """Checked borders of the sequences packed into the one row ``[1, t]``."""
    borders = cu_seqlens.tolist()
    if row.shape[0] != 1:
        raise ValueError(f"cu_seqlens with {row.shape[0]} rows: packed sequences stand in one row")
    if not borders or borders[0] != 0 or borders[-1] > row.shape[1] or any(a > b for a, b in pairwise(borders)):
        raise ValueError(f"cu_seqlens is {borders}: expected borders that rise from 0 to at most {row.shape[1]}")
    return borders


# ----------------------------------------------------------------------------------------------- values and gradients


@torch.no_grad()
def teacher_log_probs(
    query: Tensor, key: Tensor, sample: QuerySample, *, scale: float, chunk_queries: int | None = None
) -> Tensor:
    """Attention log-probabilities of the sampled queries over their sampled keys; detached.

    Args:
        query: ``[s, b, np, d]``, after RoPE and query norm.
        key: ``[s, b, ng, d]``; head ``j`` of the query uses key head ``j // (np / ng)``.
        sample: which queries and keys.
        scale: softmax scale.
        chunk_queries: queries per chunk, see :func:`attention_alignment`.

    Returns:
        ``[Q, np, K]``, at least fp32; ``-inf`` where the key is not there. Collectives: none.
    """
    _check_shapes(query, key)
    result = query.new_empty(len(sample.position), query.shape[2], sample.keys.shape[1], dtype=_accumulator(query))
    for part, chunk in _chunks(sample, key, chunk_queries):
        *_, scores = _gathered_scores(query, key, chunk, scale)
        result[part] = scores.log_softmax(-1)
    return result


@torch.no_grad()
def attention_alignment(
    query: Tensor,
    key: Tensor,
    teacher_log_probs: Tensor,
    sample: QuerySample,
    coefficients: Tensor,
    *,
    scale: float,
    num_heads_total: int,
    chunk_queries: int | None = None,
) -> AttentionLoss:
    """Attention loss ``sum_t coefficients_t * (1/H) sum_j JS(a_tj, sg(b_tj))`` and its gradients, chunked over queries.

    Scores and gathered keys exist for one chunk at a time: beyond the two gradients (the key's in at least fp32 until
    the end) memory is bounded by a few buffers of ``chunk_queries * K * max(np, ng * d)`` numbers, whatever Q.
    Arithmetic is fp32, float64 for float64 inputs. The teacher is a constant; the result carries no graph.

    Args:
        query: ``[s, b, np, d]`` of the student, after RoPE and query norm.
        key: ``[s, b, ng, d]`` of the student; head ``j`` of the query uses key head ``j // (np / ng)``.
        teacher_log_probs: ``[Q, np, K]`` from :func:`teacher_log_probs`. Scores serve too: softmax is invariant.
        sample: which queries and keys.
        coefficients: ``[Q]`` signed weight of each query, everything included.
        scale: softmax scale of the student.
        num_heads_total: H, query heads over all tensor-parallel ranks.
        chunk_queries: queries per chunk; the result does not depend on it beyond rounding. None: as many as keep the
            memory of a chunk near 30 MiB on CPU, where it should stay in the cache, and 220 MiB on a GPU.

    Returns:
        :class:`AttentionLoss` of this rank's heads; summed over the tensor-parallel ranks, ``values`` is the mean over
        all heads. Collectives: none. On CUDA the key's gradient is summed by atomics, in an order fixed only under
        ``torch.use_deterministic_algorithms``.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check_shapes(query, key)
    num_queries = len(sample.position)
    expected = (num_queries, query.shape[2], sample.keys.shape[1])
    if teacher_log_probs.shape != expected or coefficients.shape != expected[:1]:
        raise ValueError(
            f"teacher_log_probs {list(teacher_log_probs.shape)} and coefficients {list(coefficients.shape)}: expected "
            f"{list(expected)} and {list(expected[:1])} for this sample and query"
        )
    values = query.new_empty(num_queries, dtype=_accumulator(query))
    query_gradient = query.new_zeros(query.shape)
    key_gradient = key.new_zeros(key.shape, dtype=_accumulator(key))
    for part, chunk in _chunks(sample, key, chunk_queries):
        weights = upcast(coefficients[part]).to(values.dtype) / num_heads_total
        divergence = _add_chunk_gradients(
            query, key, teacher_log_probs[part], chunk, weights, scale, query_gradient, key_gradient
        )
        values[part] = divergence.sum(1) / num_heads_total
    return AttentionLoss(values, query_gradient, key_gradient.to(key.dtype))


def _add_chunk_gradients(
    query: Tensor,
    key: Tensor,
    teacher: Tensor,
    chunk: QuerySample,
    weights: Tensor,
    scale: float,
    query_gradient: Tensor,
    key_gradient: Tensor,
) -> Tensor:
    """Add a chunk's gradients of ``sum(weights * JS)`` to both buffers; returns JS by query and head, ``[q, np]``."""
    grouped, keys, scores = _gathered_scores(query, key, chunk, scale)
    with torch.enable_grad():
        rows, teacher_rows = scores.requires_grad_().flatten(0, 1), teacher.flatten(0, 1)
        divergence = vocab_parallel_js(rows, teacher_rows).view(scores.shape[:2])
    (gradient,) = torch.autograd.grad(divergence, scores, weights.unsqueeze(1).expand_as(divergence))
    gradient = gradient.unflatten(1, grouped.shape[1:3]) * scale
    num_rows = query.shape[1]
    for_queries = torch.einsum("qgrk,qkgd->qgrd", gradient, keys).flatten(1, 2)
    # A query stands in one chunk only, so its gradient is rounded to the input's dtype once.
    at_queries = chunk.position * num_rows + chunk.sequence
    query_gradient.flatten(0, 1).index_add_(0, at_queries, for_queries.to(query_gradient.dtype))
    for_keys = torch.einsum("qgrk,qgrd->qkgd", gradient, grouped).flatten(0, 1)
    at_keys = chunk.keys * num_rows + chunk.sequence.unsqueeze(1)
    key_gradient.flatten(0, 1).index_add_(0, at_keys.flatten(), for_keys)
    return divergence.detach()


def _gathered_scores(query: Tensor, key: Tensor, chunk: QuerySample, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[q, ng, np/ng, d]``, keys ``[q, K, ng, d]`` and scores ``[q, np, K]`` of a chunk, at least fp32."""
    num_query_heads, num_key_heads = query.shape[2], key.shape[2]
    chosen = upcast(query[chunk.position, chunk.sequence])
    grouped = chosen.unflatten(1, (num_key_heads, num_query_heads // num_key_heads))
    keys = upcast(key[chunk.keys, chunk.sequence.unsqueeze(1)])
    scores = torch.einsum("qgrd,qkgd->qgrk", grouped, keys).flatten(1, 2).mul_(scale)
    return grouped, keys, scores.masked_fill_(~chunk.valid.unsqueeze(1), -torch.inf)


# Bytes of a chunk's gathered keys; with gradients and scores a chunk takes about 3.4 times as much.
_GATHERED_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


def _chunks(sample: QuerySample, key: Tensor, size: int | None) -> Iterator[tuple[slice, QuerySample]]:
    if size is None:
        of_one_query = sample.keys.shape[1] * key.shape[2] * key.shape[3] * _accumulator(key).itemsize
        size = max(1, _GATHERED_BYTES.get(key.device.type, _GATHERED_BYTES["cpu"]) // max(of_one_query, 1))
    if size < 1:
        raise ValueError(f"chunk_queries is {size}: expected at least 1")
    for start in range(0, len(sample.position), size):
        part = slice(start, start + size)
        yield part, QuerySample(sample.position[part], sample.sequence[part], sample.keys[part], sample.valid[part])


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_shapes(query: Tensor, key: Tensor) -> None:
    # Along s they may differ: a context-parallel rank has some of the queries and all of the keys.
    fits = query.dim() == key.dim() == 4 and query.shape[1] == key.shape[1] and query.shape[3] == key.shape[3]
    if not fits or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)}: expected [s, b, np, d] and [s, b, ng, d] with np a "
            "multiple of ng"
        )
