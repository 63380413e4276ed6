r"""The Jensen-Shannon row kernels in plain PyTorch: any device, any dtype, block by block.

:mod:`megatron_oisd.losses.js` splits the work on a chunk of logits into three steps, so that vocabulary shards can be
reduced between them; :func:`fused_` does all three where the whole vocabulary is here. The Triton kernels have the same
functions. With s, t the scaled log-probabilities of student and teacher and d = t - s,

    log(p / m) = log 2 - softplus(d),        log(q / m) = log(p / m) + d

which needs one softplus for both. d is limited to where the smaller of the two probabilities is still above rounding
next to the larger one; beyond, the limit changes nothing but keeps ``log(q / m)`` free of cancellation. Rows are taken
in blocks that stay in the cache, and no fp32 copy of a whole chunk is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_oisd.losses.numerics import upcast

_LOG_2 = math.log(2.0)
# Elements of a block: what fits a core's cache on CPU; on a GPU as few launches as memory allows.
_BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}


def _blocks(logits: Tensor, columns: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS.get(logits.device.type, 1 << 22) // max(columns, 1))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def _scaled(logits: Tensor, block: slice, columns: int, temperature: float) -> Tensor:
    """An fp32 (float64) copy of a block, divided by the temperature."""
    part = logits[block, :columns]
    scaled = part.to(torch.float64 if part.dtype == torch.float64 else torch.float32, copy=True)
    return scaled.div_(temperature) if temperature != 1.0 else scaled


def statistics(student: Tensor, teacher: Tensor, *, columns: int, temperature: float) -> Tensor:
    """Maximum and sum of exponentials of every row of this shard.

    Returns:
        ``[2, 2, n]``: (maximum, sum of ``exp(logit - maximum)``) by (student, teacher); a row without finite logits has
        maximum ``-inf`` and sum 0.
    """
    result = upcast(student[:0]).new_zeros(2, 2, student.shape[0])
    result[0] = -torch.inf
    if columns == 0:
        return result
    for which, logits in enumerate((student, teacher)):
        for block in _blocks(logits, columns):
            scaled = _scaled(logits, block, columns, temperature)
            maximum = scaled.amax(-1)
            shift = maximum.masked_fill(torch.isneginf(maximum), 0.0)
            result[0, which, block] = maximum
            result[1, which, block] = scaled.sub_(shift.unsqueeze(-1)).exp_().sum(-1)
    return result


def divergences(student: Tensor, teacher: Tensor, lse: Tensor, *, columns: int, temperature: float) -> Tensor:
    """This shard's part of KL(p||m) and KL(q||m) of every row, given the whole rows' log-sum-exp ``[2, n]``."""
    result = lse.new_zeros(2, student.shape[0])
    for block in _blocks(student, columns):
        s = _scaled(student, block, columns, temperature).sub_(lse[0, block].unsqueeze(-1))
        t = _scaled(teacher, block, columns, temperature).sub_(lse[1, block].unsqueeze(-1))
        excess, d = _excess(s, t)
        result[0, block] = torch.linalg.vecdot(s.exp_(), excess)
        result[1, block] = torch.linalg.vecdot(t.exp_(), excess.add_(d))
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
    factor = (0.5 / temperature) * scale
    for block in _blocks(student, columns):
        s = _scaled(student, block, columns, temperature).sub_(lse[0, block].unsqueeze(-1))
        t = _scaled(teacher, block, columns, temperature).sub_(lse[1, block].unsqueeze(-1))
        excess, _ = _excess(s, t)
        _write(out, block, columns, s.exp_(), excess, kl[block], factor[block])
    out[:, columns:] = 0
    return out


def fused_(student: Tensor, teacher: Tensor, scale: Tensor, *, columns: int, temperature: float) -> Tensor:
    """Values ``[n]`` of whole rows; ``scale * dJS/dz`` goes over the student's logits. One visit to each block."""
    factor, pieces = (0.5 / temperature) * scale, []
    for block in _blocks(student, columns):
        s = torch.log_softmax(_scaled(student, block, columns, temperature), dim=-1)
        t = torch.log_softmax(_scaled(teacher, block, columns, temperature), dim=-1)
        excess, d = _excess(s, t)
        kl_q = torch.linalg.vecdot(t.exp_(), d.add_(excess))
        p = s.exp_()
        kl_p = torch.linalg.vecdot(p, excess)
        pieces.append(kl_p.add(kl_q).mul_(0.5))
        _write(student, block, columns, p, excess, kl_p, factor[block])
    student[:, columns:] = 0
    values = torch.cat(pieces) if pieces else scale.new_zeros(student.shape[0])
    return values.clamp_min_(0.0)


def _excess(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(log(p / m), d = t - s); a column without mass on both sides counts as equal, one-sided ones stay finite."""
    limit = 80.0 if s.dtype == torch.float64 else 24.0
    d = torch.sub(t, s).clamp_(-limit, limit).nan_to_num_(nan=0.0)
    return torch.nn.functional.softplus(d, threshold=limit).neg_().add_(_LOG_2), d


def _write(out: Tensor, block: slice, columns: int, p: Tensor, excess: Tensor, kl: Tensor, factor: Tensor) -> None:
    out[block, :columns] = p.mul_(excess.sub_(kl.unsqueeze(-1))).mul_(factor.unsqueeze(-1))
