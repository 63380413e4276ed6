r"""The Jensen-Shannon row kernels in plain PyTorch: any device, any dtype, block by block.

:mod:`megatron_oisd.losses.js` splits the work on a chunk of logits into three steps, so that vocabulary shards can be
reduced between them; :func:`fused_` does all three where the whole vocabulary is here. The Triton kernels have the same
functions. With s, t the scaled log-probabilities of student and teacher and d = t - s,

    log(m / p) = log((1 + e^d) / 2),        log(q / m) = d - log(m / p)

which needs one exponential and one logarithm for both, and is exactly 0 where s and t are equal. d is limited to where
the smaller of the two probabilities is still above rounding next to the larger one; beyond, the limit changes nothing
but keeps ``log(q / m)`` free of cancellation.

Rows are taken in blocks that stay in the cache, and no fp32 copy of a whole chunk is made. The few buffers of a block
are reused: memory that is new each time costs a CPU more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_oisd.losses.numerics import upcast

# Elements of a block: what fits a core's cache on CPU; on a GPU as few launches as memory allows (four blocks in fp32).
_BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}


def blocks(logits: Tensor, columns: int, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of rows, each with ``buffers`` tensors ``[rows, columns]`` in fp32 (float64) of arbitrary content."""
    rows = max(1, _BLOCK_ELEMENTS.get(logits.device.type, 1 << 22) // max(columns, 1))
    own = [upcast(logits[:0]).new_empty(min(rows, logits.shape[0]), columns) for _ in range(buffers)]
    for start in range(0, logits.shape[0], rows):
        block = slice(start, start + rows)
        size = min(rows, logits.shape[0] - start)
        yield block, [buffer[:size] for buffer in own]


def scaled_(into: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in ``into``."""
    into.copy_(logits[:, : into.shape[1]])
    return into.div_(temperature) if temperature != 1.0 else into


def row_statistics(logits: Tensor, *, columns: int, temperature: float) -> Tensor:
    """Maximum and sum of exponentials of every row of this shard.

    Returns:
        ``[2, n]``: maximum, sum of ``exp(logit - maximum)``; a row without finite logits has maximum ``-inf`` and
        sum 0.
    """
    result = upcast(logits[:0]).new_zeros(2, logits.shape[0])
    result[0] = -torch.inf
    if columns == 0:
        return result
    for block, (scaled,) in blocks(logits, columns, 1):
        maximum = scaled_(scaled, logits[block], temperature).amax(-1)
        shift = maximum.masked_fill(torch.isneginf(maximum), 0.0)
        result[0, block] = maximum
        result[1, block] = scaled.sub_(shift.unsqueeze(-1)).exp_().sum(-1)
    return result


def statistics(student: Tensor, teacher: Tensor, *, columns: int, temperature: float) -> Tensor:
    """:func:`row_statistics` of both: ``[2, 2, n]``, (maximum, sum) by (student, teacher)."""
    parts = [row_statistics(logits, columns=columns, temperature=temperature) for logits in (student, teacher)]
    return torch.stack(parts, dim=1)


def divergences(student: Tensor, teacher: Tensor, lse: Tensor, *, columns: int, temperature: float) -> Tensor:
    """This shard's part of KL(p||m) and KL(q||m) of every row, given the whole rows' log-sum-exp ``[2, n]``."""
    result = lse.new_zeros(2, student.shape[0])
    for block, (p, q, d, log_ratio) in blocks(student, columns, 4):
        scaled_(p, student[block], temperature).sub_(lse[0, block].unsqueeze(-1))
        scaled_(q, teacher[block], temperature).sub_(lse[1, block].unsqueeze(-1))
        _log_ratio_(torch.sub(q, p, out=d), log_ratio)
        result[1, block] = d.sub_(log_ratio).mul_(q.exp_()).sum(-1)
        result[0, block] = log_ratio.mul_(p.exp_()).sum(-1).neg_()
    return result


def gradient_(
    student: Tensor,
    teacher: Tensor,
    lse: Tensor,
    kl: Tensor,
    scale: Tensor,
    *,
    columns: int,
    temperature: float,
    out: Tensor | None = None,
) -> Tensor:
    """Write ``scale * dJS/dz`` of every row over the student's logits, or into ``out``; padded columns become 0.

    Args:
        student: ``[n, v]`` logits, overwritten unless ``out`` is given.
        teacher: ``[n, v]`` logits.
        lse: ``[2, n]`` log-sum-exp of the whole rows.
        kl: ``[n]`` KL(p||m) of the whole rows.
        scale: ``[n]`` factor of each row.
        columns: columns that are vocabulary.
        temperature: tau.
        out: where to write instead.
    """
    out = student if out is None else out
    factor = (-0.5 / temperature) * scale
    for block, (p, d, log_ratio) in blocks(student, columns, 3):
        scaled_(p, student[block], temperature).sub_(lse[0, block].unsqueeze(-1))
        scaled_(d, teacher[block], temperature).sub_(lse[1, block].unsqueeze(-1)).sub_(p)
        _log_ratio_(d, log_ratio)
        log_ratio.add_(kl[block].unsqueeze(-1)).mul_(p.exp_()).mul_(factor[block].unsqueeze(-1))
        out[block, :columns] = log_ratio
    out[:, columns:] = 0
    return out


def fused_(student: Tensor, teacher: Tensor, scale: Tensor, *, columns: int, temperature: float) -> Tensor:
    """Values ``[n]`` of whole rows; ``scale * dJS/dz`` goes over the student's logits. One visit to each block."""
    values = upcast(student[:0]).new_zeros(student.shape[0])
    factor = (-0.5 / temperature) * scale.unsqueeze(-1)
    for block, (p, q, d, log_ratio) in blocks(student, columns, 4):
        # p and q stay unnormalised: each saves a pass and an exponential.
        scaled_(p, student[block], temperature).sub_(p.amax(-1, keepdim=True))
        scaled_(q, teacher[block], temperature).sub_(q.amax(-1, keepdim=True))
        torch.sub(q, p, out=d)
        p_sum, q_sum = p.exp_().sum(-1, keepdim=True), q.exp_().sum(-1, keepdim=True)
        _log_ratio_(d.sub_(q_sum.log() - p_sum.log()), log_ratio)
        kl_q = d.sub_(log_ratio).mul_(q).sum(-1, keepdim=True).div_(q_sum)
        kl_p = torch.mul(p, log_ratio, out=d).sum(-1, keepdim=True).div_(p_sum).neg_()
        values[block] = kl_p.add(kl_q).mul_(0.5).squeeze(-1)
        log_ratio.add_(kl_p).mul_(p).mul_(factor[block] / p_sum)
        student[block, :columns] = log_ratio
    student[:, columns:] = 0
    return values.clamp_min_(0.0)


def _log_ratio_(d: Tensor, into: Tensor) -> None:
    """log(m / p) from d = t - s, which is limited; without mass on both sides a column counts as equal."""
    limit = 80.0 if d.dtype == torch.float64 else 24.0
    d.clamp_(-limit, limit).nan_to_num_(nan=0.0)
    # Half of 1 + e^0 is exactly 1, and its logarithm exactly 0.
    torch.exp(d, out=into).add_(1.0).mul_(0.5).log_()
