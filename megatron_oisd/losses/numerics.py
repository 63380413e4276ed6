"""Precision and reduction helpers shared by the losses."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def upcast(tensor: Tensor) -> Tensor:
    """At least fp32: half precisions become fp32, float64 (used by the proofs) stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def group_size(group: Group) -> int:
    """Ranks in ``group``; 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This process's rank in ``group``; 0 for None."""
    return 0 if group is None else group.rank()


def valid_columns(vocab_size: int, rank: int, width: int) -> int:
    """Leading columns of a rank's vocabulary shard of ``width`` that are vocabulary and not padding; may be 0."""
    return min(max(vocab_size - rank * width, 0), width)


def all_reduce_sum_(tensor: Tensor, group: Group) -> Tensor:
    """Sum ``tensor`` in place over ``group``; no autograd. None is a group of one."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_rows(local: Tensor, bounds: list[int], group: Group) -> Tensor:
    """Put rows that are shared out over ``group`` together again; no autograd.

    Args:
        local: ``[bounds[r + 1] - bounds[r], ...]`` the rows of rank r.
        bounds: borders of the ranks' rows, ``size + 1`` of them from 0 to N.
        group: the ranks.

    Returns:
        ``[N, ...]``, the same on every rank. Collectives: one all-gather of the largest share, none where N is 0.
    """
    if group_size(group) == 1 or bounds[-1] == 0:
        return local
    sizes = [stop - first for first, stop in pairwise(bounds)]
    largest = max(sizes)
    padded = local
    if len(local) < largest:
        padded = local.new_zeros(largest, *local.shape[1:])
        padded[: len(local)] = local
    everything = local.new_empty(len(sizes) * largest, *local.shape[1:])
    dist.all_gather_into_tensor(everything, padded.contiguous(), group=group)
    if min(sizes) == largest:
        return everything
    return torch.cat([part[:size] for part, size in zip(everything.split(largest), sizes, strict=True)])


def combine_log_sum_exp(statistics: Tensor, group: Group) -> Tensor:
    """Log-sum-exp over shards from each shard's ``[2, ...]``: maximum and sum of ``exp(logit - maximum)``.

    Returns:
        ``[...]``, identical on every rank. Collectives: one all-gather of ``statistics``; not differentiable.
    """
    if group_size(group) == 1:
        shift, total = statistics
        return torch.where(torch.isneginf(shift), 0.0, shift) + total.log()
    gathered = [torch.empty_like(statistics) for _ in range(group_size(group))]
    dist.all_gather(gathered, statistics.contiguous(), group=group)
    shifts = torch.stack([part[0] for part in gathered])
    totals = torch.stack([part[1] for part in gathered])
    top = shifts.amax(0)
    top = torch.where(torch.isneginf(top), 0.0, top)
    return top + (totals * (shifts - top).exp()).sum(0).log()
