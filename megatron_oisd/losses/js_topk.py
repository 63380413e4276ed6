r"""A lossy teacher: its k most likely tokens and one bucket for the rest.

Student and teacher are both coarsened to k + 1 events: the teacher's k tokens and the tail. With S the k tokens,

    JS_k = JS((p_i for i in S, 1 - sum_S p), (q_i for i in S, 1 - sum_S q))

Merging events never increases a Jensen-Shannon divergence (data processing), so ``0 <= JS_k <= JS``, and
``JS - JS_k <= log(2) * (tail_p + tail_q) / 2``: the part of JS that lies within the tail. The error therefore vanishes
with the larger tail mass, not with k as such; ``tests/losses/test_js_topk.py`` measures it. The gradient is exact for
JS_k:

    dJS_k/dz_i = p_i / (2 tau) * (r_i - sum_j p'_j r_j),   r_i = log(p'_i / m'_i), the tail's r for every i outside S

It saves the teacher's matrix product and, on the wire, ``h`` numbers per token become ``2 k``. Shape legend: see
:mod:`megatron_oisd.losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oisd.losses.js_eager import blocks, row_statistics, scaled_
from megatron_oisd.losses.numerics import Group, all_reduce_sum_, combine_log_sum_exp, group_size, upcast

_LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class TopKTeacher:
    """The teacher's k most likely tokens, the same on every tensor-parallel rank."""

    log_probs: Tensor
    """``[N, k]`` log-probabilities at the loss's temperature, over the whole vocabulary."""
    token_ids: Tensor
    """``[N, k]`` token ids of the whole vocabulary, distinct in each row."""

    def rows(self, chosen: slice | Tensor) -> TopKTeacher:
        """The rows of a chunk."""
        return TopKTeacher(self.log_probs[chosen], self.token_ids[chosen])


def make_topk_teacher(
    logits: Tensor,
    k: int,
    *,
    temperature: float,
    group: Group = None,
    first_token: int = 0,
    valid_columns: int | None = None,
) -> TopKTeacher:
    """Pick the k most likely tokens from vocabulary shards.

    Args:
        logits: ``[N, v]`` this rank's shard.
        k: tokens kept; at most the vocabulary's size.
        temperature: tau.
        group: tensor-parallel group.
        first_token: token id of the shard's first column.
        valid_columns: leading columns that are vocabulary; None: all.

    Collectives: one all-gather for the normaliser, two of ``[N, k]`` for the shards' candidates.
    """
    columns = logits.shape[-1] if valid_columns is None else valid_columns
    lse = combine_log_sum_exp(row_statistics(logits, columns=columns, temperature=temperature), group)
    mine = min(k, columns)
    values, indices = logits[:, :columns].topk(mine, dim=-1)
    values = upcast(values) / temperature - lse.unsqueeze(-1)
    # Every rank offers k candidates, so that shards of any width can be gathered.
    values = torch.nn.functional.pad(values, (0, k - mine), value=-torch.inf)
    tokens = torch.nn.functional.pad(indices + first_token, (0, k - mine), value=-1)
    if group_size(group) > 1:
        values, tokens = (_gather_columns(part, group) for part in (values, tokens))
    best = values.topk(k, dim=-1)
    if best.values.numel() and torch.isneginf(best.values).all(0).any():
        raise ValueError(f"k is {k}: expected at most the vocabulary's size")
    return TopKTeacher(best.values, tokens.gather(-1, best.indices))


def _gather_columns(part: Tensor, group: Group) -> Tensor:
    pieces = [torch.empty_like(part) for _ in range(group_size(group))]
    torch.distributed.all_gather(pieces, part.contiguous(), group=group)
    return torch.cat(pieces, dim=-1)


def topk_rows_(
    student: Tensor,
    teacher: TopKTeacher,
    scale: Tensor,
    *,
    columns: int,
    temperature: float,
    group: Group,
    first_token: int,
) -> Tensor:
    """Values JS_k ``[n]``; ``scale * dJS_k/dz`` is written over the student's logits ``[n, v]``.

    Collectives: one all-gather (``2 n``), one all-reduce (``k n``).
    """
    lse = combine_log_sum_exp(row_statistics(student, columns=columns, temperature=temperature), group).unsqueeze(-1)
    local = teacher.token_ids - first_token
    here = (local >= 0) & (local < columns)
    index = local.clamp(0, max(columns - 1, 0))
    chosen = lse.new_zeros(index.shape)
    if columns:
        chosen.copy_(student.gather(-1, index)).div_(temperature).sub_(lse).masked_fill_(~here, 0.0)
    log_p_k = all_reduce_sum_(chosen, group)
    student_events, teacher_events = _with_tail(log_p_k), _with_tail(teacher.log_probs.to(lse.dtype))
    log_m = torch.logaddexp(student_events, teacher_events) - _LOG_2
    ratio = torch.where(torch.isneginf(student_events), 0.0, student_events - log_m)
    theirs = torch.where(torch.isneginf(teacher_events), 0.0, teacher_events - log_m)
    kl_p = (student_events.exp() * ratio).sum(-1)
    kl_q = (teacher_events.exp() * theirs).sum(-1)
    factor = (scale * (0.5 / temperature)).unsqueeze(-1)
    own, tail = ratio[:, :-1] - kl_p.unsqueeze(-1), (ratio[:, -1] - kl_p).unsqueeze(-1)
    for block, (gradient,) in blocks(student, columns, 1) if columns else ():
        scaled_(gradient, student[block], temperature).sub_(lse[block]).exp_()
        # Outside the k tokens every column has the tail's ratio; the tokens' own columns are set after that.
        at, mine = index[block], here[block]
        wanted = gradient.gather(-1, at).mul_(own[block])
        gradient.mul_(tail[block])
        # As a correction, since several absent tokens share index 0 and must leave it alone.
        gradient.scatter_add_(-1, at, torch.where(mine, wanted - gradient.gather(-1, at), 0.0))
        student[block, :columns] = gradient.mul_(factor[block])
    student[:, columns:] = 0
    return (0.5 * (kl_p + kl_q)).clamp_min_(0.0)


def _with_tail(log_probs: Tensor) -> Tensor:
    """Append the log of the remaining mass: ``[n, k]`` to ``[n, k + 1]``."""
    rest = (1.0 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(0.0)
    return torch.cat([log_probs, rest.log()], dim=-1)
