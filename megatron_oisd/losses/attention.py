r"""Sampled-key attention alignment (OISD, "where to look").

For a sampled query position t, query head j of the student layer is compared with query head j of the last layer. Both
attention distributions are softmaxed over the *same* sampled set of causal keys of t:

* a window: the newest ``window`` positions ``t, t-1, ...`` of the query's own sequence;
* ``num_global`` equally spaced positions ``floor(g * old / num_global)`` among the ``old`` positions before the window
  (all of them where there are no more than ``num_global``), so that position 0, the attention sink, is always included.

    L_attn = mean over queries of  w_t * (1/H) sum_j JS(a_t^{l,j}, sg(a_t^{L,j}))

Only queries and keys are needed, never attention probabilities, so any attention backend will do. Shape legend: see
:mod:`megatron_oisd.losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oisd.losses.js import vocab_parallel_js
from megatron_oisd.losses.numerics import upcast


@dataclass(frozen=True)
class QuerySample:
    """Sampled query positions and their causal keys; equal on every rank and for every layer."""

    position: Tensor
    """``[Q]`` position of the query in its sequence."""
    sequence: Tensor
    """``[Q]`` index of the sequence in the microbatch."""
    keys: Tensor
    """``[Q, K]`` key positions; entries that are not valid hold 0."""
    valid: Tensor
    """``[Q, K]`` which entries of ``keys`` are there."""

    def to(self, device: torch.device) -> QuerySample:
        """Copy to ``device``."""
        return QuerySample(*(part.to(device) for part in (self.position, self.sequence, self.keys, self.valid)))


def sample_query_positions(mask: Tensor, *, num_queries: int, seed: int, step: int, sequence_ids: list[int]) -> Tensor:
    """Choose at most ``num_queries`` positions of each sequence where ``mask`` is set.

    The choice depends on (seed, step, the sequence's own id) alone: not on the rank, the microbatch it fell into or
    the layer, so student and teacher agree without talking and results do not depend on the parallel layout.

    Args:
        mask: ``[b, s]`` bool, on CPU.
        num_queries: positions per sequence at most; sequences with fewer use all of theirs.
        seed: run seed.
        step: number of the optimizer step.
        sequence_ids: ``b`` integers that name the sequences.

    Returns:
        ``[b, s]`` bool on CPU, the chosen positions.
    """
    chosen = mask.clone()
    for row, identity in enumerate(sequence_ids):
        positions = mask[row].nonzero().flatten()
        if len(positions) <= num_queries:
            continue
        generator = torch.Generator().manual_seed(_mix(seed, step, identity))
        order = torch.randperm(len(positions), generator=generator)
        chosen[row, positions[order[num_queries:]]] = False
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


def sample_keys(chosen: Tensor, *, window: int, num_global: int) -> QuerySample:
    """List the sampled causal keys of every chosen query.

    Args:
        chosen: ``[b, s]`` bool, the query positions; sequences start at position 0.
        window: newest keys.
        num_global: equally spaced older keys.
    """
    sequence, position = chosen.nonzero(as_tuple=True)
    newest = position.unsqueeze(1) - torch.arange(window, device=chosen.device)
    old = (position + 1 - window).clamp_min(0).unsqueeze(1)
    index = torch.arange(num_global, device=chosen.device).expand(len(position), -1)
    spaced = torch.where(old > num_global, index * old // max(num_global, 1), index)
    keys = torch.cat([newest, spaced], dim=1)
    valid = torch.cat([newest >= 0, index < old], dim=1)
    return QuerySample(position, sequence, keys.masked_fill(~valid, 0), valid)


def sampled_scores(query: Tensor, key: Tensor, sample: QuerySample, *, scale: float) -> Tensor:
    """Attention logits of the sampled queries on their sampled keys.

    Args:
        query: ``[s, b, np, d]``, after RoPE and query norm.
        key: ``[s, b, ng, d]``; head ``j`` of the query uses key head ``j // (np / ng)``.
        sample: which queries and keys.
        scale: softmax scale.

    Returns:
        ``[Q, np, K]``, at least fp32; ``-inf`` where the key is not there. Differentiable in both.
    """
    num_query_heads, num_key_heads = query.shape[2], key.shape[2]
    chosen_queries = upcast(query[sample.position, sample.sequence])
    chosen_keys = upcast(key[sample.keys, sample.sequence.unsqueeze(1)])
    grouped = chosen_queries.unflatten(1, (num_key_heads, num_query_heads // num_key_heads))
    scores = torch.einsum("qgrd,qkgd->qgrk", grouped, chosen_keys).flatten(1, 2) * scale
    return scores.masked_fill(~sample.valid.unsqueeze(1), -torch.inf)


def attention_js(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each query and head: ``[Q, np, K]`` twice to ``[Q, np]``, nats.

    The teacher's scores are detached; log-probabilities serve as scores too, since softmax leaves them as they are.
    """
    keys = student_scores.shape[-1]
    rows = vocab_parallel_js(student_scores.reshape(-1, keys), teacher_scores.reshape(-1, keys), temperature=1.0)
    return rows.view(student_scores.shape[:-1])
