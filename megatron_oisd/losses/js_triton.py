# mypy: disable-error-code="no-untyped-def"
r"""The Jensen-Shannon row kernels in Triton: the functions of :mod:`.js_eager`, fused.

With s, t the log2-probabilities of student and teacher, d = t - s and ``u = 2^-|d|``, a column needs two exponentials
and a polynomial, and nothing cancels:

    max(p, q) = 2^max(s, t),                          min(p, q) = u max(p, q)
    log2(p / m) = log2(2 / (1 + u)) - max(d, 0),      log2(q / m) = log2(2 / (1 + u)) + min(d, 0)

Equal logits in student and teacher give exactly 0. Kernels of this kind are bound by instructions as much as by memory,
hence the polynomial (10 instructions; the library's ``log2`` takes 27).

Maximum and sum are kept for each lane of a block, not for each block: one exponential ``e = 2^-|x - max|`` serves both
cases (``sum * e + 1`` where x is the new maximum, ``sum + e`` elsewhere), so that a pass has one reduction across
threads, after its last column.

Memory, in elements of the logits (a pair is one student and one teacher logit); arithmetic and sums are fp32, no copy
is made and nothing but ``[n]`` vectors is stored beside the gradient:

=================  =====  ======  ==========================================================================
function           reads  writes  exponentials of one pair
=================  =====  ======  ==========================================================================
``statistics``     2      0       2, one pass over both tiles
``divergences``    2      0       2
``gradient_``      2      1       2
``fused_``         6      1       6, three passes of one program over its row
=================  =====  ======  ==========================================================================

``fused_`` needs KL(p||m) of the whole row before it can write the first gradient, and a row (600 kB for 150 000 columns
in bf16) is longer than what a multiprocessor holds, hence three passes. They walk the row forwards, backwards and
forwards, so a pass starts on the columns that the one before left in the second-level cache: from device memory come 2
reads and 1 write where the rows in flight fit there (one program per multiprocessor: 132 rows on an H200, so up to some
60 000 columns in bf16 by its 50 MB; estimated, not measured), and at most 6 and 1 where they do not.

One program takes one row. Fewer rows than multiprocessors leave some idle (a row is not split over programs: only the
last, short chunk of tokens has so few). Row offsets are 64 bits wide, columns need not be adjacent. A float64 tensor
goes to :mod:`.js_eager`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_oisd.losses import js_eager

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernels read and write; any mixture."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Below every fp32 logit that can matter, and finite: differences to it are never nan.
_LOWEST = tl.constexpr(-1.0e30)
# log2 of a probability that is 0 in fp32, its square root too: without mass a column's d stays finite.
_FLOOR = tl.constexpr(-256.0)


@triton.jit
def _load(logits, offsets, column_stride, columns, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(logits + offsets * column_stride).to(tl.float32)
    return tl.load(logits + offsets * column_stride, mask=offsets < columns, other=float("-inf")).to(tl.float32)


@triton.jit
def _online(maximum, total, logits, to_log2):
    """Take one more logit into every lane's maximum and sum of exponentials; nan ends up in the sum."""
    shrink = tl.exp2(-tl.abs((logits - maximum) * to_log2))
    larger = logits > maximum
    total = tl.where(larger, total * shrink + 1.0, total + shrink)
    return tl.where(larger, logits, maximum), total


@triton.jit
def _merge(maximum, total, to_log2):
    """The row's maximum and sum from the lanes'; (-inf, 0) without a finite logit."""
    top = tl.max(maximum, 0)
    total = tl.sum(total * tl.exp2((maximum - top) * to_log2), 0)
    return tl.where(top == _LOWEST, float("-inf"), top), total


@triton.jit
def _row_statistics(student, teacher, s_stride, t_stride, columns, to_log2, BLOCK: tl.constexpr):
    """(maximum, sum) of the student, then of the teacher; the row is read forwards."""
    lanes = tl.arange(0, BLOCK)
    s_max = tl.full([BLOCK], _LOWEST, tl.float32)
    t_max = tl.full([BLOCK], _LOWEST, tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    # The last block alone is masked: with a mask, an odd number of columns would forbid wide loads everywhere.
    last = (columns - 1) // BLOCK * BLOCK
    for start in range(0, last, BLOCK):
        s_max, s_sum = _online(s_max, s_sum, _load(student, start + lanes, s_stride, columns, True), to_log2)
        t_max, t_sum = _online(t_max, t_sum, _load(teacher, start + lanes, t_stride, columns, True), to_log2)
    s_max, s_sum = _online(s_max, s_sum, _load(student, last + lanes, s_stride, columns, False), to_log2)
    t_max, t_sum = _online(t_max, t_sum, _load(teacher, last + lanes, t_stride, columns, False), to_log2)
    s_max, s_sum = _merge(s_max, s_sum, to_log2)
    t_max, t_sum = _merge(t_max, t_sum, to_log2)
    return s_max, s_sum, t_max, t_sum


@triton.jit
def _log2_probability(logits, scale, shift, to_log2, offset):
    """``(scale * logit - shift) * to_log2 - offset``, from below limited; nan stays nan."""
    return tl.maximum((logits * scale - shift) * to_log2 - offset, _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log2_mean_ratio(u):
    """``log2(2 / (1 + u))`` for u in [0, 1], within 1.3e-7; exactly 0 at 1.

    ``(1 - u) * R(u)`` with R the Chebyshev interpolant of degree 8 of ``log2(2 / (1 + u)) / (1 - u)`` on [0, 1].
    """
    ratio = 0.004064688924700022 * u - 0.022944631054997444
    ratio = ratio * u + 0.061002783477306366
    ratio = ratio * u - 0.10719125717878342
    ratio = ratio * u + 0.15161438286304474
    ratio = ratio * u - 0.201051726937294
    ratio = ratio * u + 0.278544545173645
    ratio = ratio * u - 0.44269120693206787
    ratio = ratio * u + 1.0
    return ratio * (1.0 - u)


@triton.jit
def _pair(s, t):
    """p, q, log2(p / m) and log2(q / m) of columns whose log2-probabilities are s and t."""
    d = t - s
    ratio = tl.exp2(-tl.abs(d))
    larger = tl.exp2(tl.maximum(s, t, propagate_nan=tl.PropagateNan.ALL))
    smaller = larger * ratio
    base = _log2_mean_ratio(ratio)
    p = tl.where(d > 0, smaller, larger)
    q = tl.where(d > 0, larger, smaller)
    return p, q, base - tl.maximum(d, 0.0), base + tl.minimum(d, 0.0)


@triton.jit
def _row_divergences(
    student, teacher, s_stride, t_stride, columns, scale, s_shift, t_shift, to_log2, s_offset, t_offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """KL(p||m) and KL(q||m) in bits; the row is read backwards."""
    lanes = tl.arange(0, BLOCK)
    last = (columns - 1) // BLOCK * BLOCK
    s = _log2_probability(_load(student, last + lanes, s_stride, columns, False), scale, s_shift, to_log2, s_offset)
    t = _log2_probability(_load(teacher, last + lanes, t_stride, columns, False), scale, t_shift, to_log2, t_offset)
    p, q, p_excess, q_excess = _pair(s, t)
    kl_p = p * p_excess
    kl_q = q * q_excess
    for done in range(0, last, BLOCK):
        offsets = last - BLOCK - done + lanes
        s = _log2_probability(_load(student, offsets, s_stride, columns, True), scale, s_shift, to_log2, s_offset)
        t = _log2_probability(_load(teacher, offsets, t_stride, columns, True), scale, t_shift, to_log2, t_offset)
        p, q, p_excess, q_excess = _pair(s, t)
        kl_p += p * p_excess
        kl_q += q * q_excess
    return tl.sum(kl_p, 0), tl.sum(kl_q, 0)


@triton.jit
def _block_gradient(
    student, teacher, out, offsets, s_stride, t_stride, o_stride, columns, scale, s_shift, t_shift, to_log2, s_offset,
    t_offset, kl_p, factor, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write ``factor * p * (log2(p / m) - kl_p)`` of one block."""
    s = _log2_probability(_load(student, offsets, s_stride, columns, WHOLE), scale, s_shift, to_log2, s_offset)
    t = _log2_probability(_load(teacher, offsets, t_stride, columns, WHOLE), scale, t_shift, to_log2, t_offset)
    p, _, p_excess, _ = _pair(s, t)
    gradient = p * (p_excess - kl_p) * factor
    if WHOLE:
        tl.store(out + offsets * o_stride, gradient)
    else:
        tl.store(out + offsets * o_stride, gradient, mask=offsets < columns)


@triton.jit(do_not_specialize=["rows"])
def _statistics(
    student, teacher, result, rows, s_rows, s_stride, t_rows, t_stride, columns, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s_max, s_sum, t_max, t_sum = _row_statistics(
        student + row * s_rows, teacher + row * t_rows, s_stride, t_stride, columns, inverse_temperature * _LOG2_E,
        BLOCK,
    )  # fmt: skip
    tl.store(result + row, s_max * inverse_temperature)
    tl.store(result + rows + row, t_max * inverse_temperature)
    tl.store(result + 2 * rows + row, s_sum)
    tl.store(result + 3 * rows + row, t_sum)


@triton.jit(do_not_specialize=["rows"])
def _divergences(
    student, teacher, lse, result, rows, s_rows, s_stride, t_rows, t_stride, columns, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kl_p, kl_q = _row_divergences(
        student + row * s_rows, teacher + row * t_rows, s_stride, t_stride, columns, inverse_temperature,
        tl.load(lse + row), tl.load(lse + rows + row), _LOG2_E, 0.0, 0.0, BLOCK,
    )  # fmt: skip
    tl.store(result + row, kl_p * _LN_2)
    tl.store(result + rows + row, kl_q * _LN_2)


@triton.jit(do_not_specialize=["rows"])
def _gradient(
    student, teacher, out, lse, kl, factor, rows, s_rows, s_stride, t_rows, t_stride, o_rows, o_stride, columns,
    inverse_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    student += row * s_rows
    teacher += row * t_rows
    out += row * o_rows
    s_lse = tl.load(lse + row)
    t_lse = tl.load(lse + rows + row)
    kl_p = tl.load(kl + row) * _LOG2_E
    scale = tl.load(factor + row) * _LN_2
    if start + BLOCK <= columns:
        _block_gradient(
            student, teacher, out, offsets, s_stride, t_stride, o_stride, columns, inverse_temperature, s_lse, t_lse,
            _LOG2_E, 0.0, 0.0, kl_p, scale, True,
        )  # fmt: skip
    else:
        _block_gradient(
            student, teacher, out, offsets, s_stride, t_stride, o_stride, columns, inverse_temperature, s_lse, t_lse,
            _LOG2_E, 0.0, 0.0, kl_p, scale, False,
        )  # fmt: skip


@triton.jit
def _fused(
    student, teacher, values, factor, s_rows, s_stride, t_rows, t_stride, columns, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * s_rows
    teacher += row * t_rows
    to_log2 = inverse_temperature * _LOG2_E
    s_max, s_sum, t_max, t_sum = _row_statistics(student, teacher, s_stride, t_stride, columns, to_log2, BLOCK)
    # Maximum and log of the sum are subtracted one after the other: large logits lose nothing.
    s_offset = tl.log2(s_sum)
    t_offset = tl.log2(t_sum)
    kl_p, kl_q = _row_divergences(
        student, teacher, s_stride, t_stride, columns, 1.0, s_max, t_max, to_log2, s_offset, t_offset, BLOCK
    )
    value = 0.5 * _LN_2 * (kl_p + kl_q)
    tl.store(values + row, tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL))
    scale = tl.load(factor + row) * _LN_2
    lanes = tl.arange(0, BLOCK)
    last = (columns - 1) // BLOCK * BLOCK
    for start in range(0, last, BLOCK):
        _block_gradient(
            student, teacher, student, start + lanes, s_stride, t_stride, s_stride, columns, 1.0, s_max, t_max, to_log2,
            s_offset, t_offset, kl_p, scale, True,
        )  # fmt: skip
    _block_gradient(
        student, teacher, student, last + lanes, s_stride, t_stride, s_stride, columns, 1.0, s_max, t_max, to_log2,
        s_offset, t_offset, kl_p, scale, False,
    )  # fmt: skip


INTERPRETED = not isinstance(_fused, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU: TRITON_INTERPRET=1 when triton was first imported."""


def statistics(student: Tensor, teacher: Tensor, *, columns: int, temperature: float) -> Tensor:
    """See :func:`.js_eager.statistics`. One pass over both tiles."""
    if _left_to_eager(columns, student, teacher):
        return js_eager.statistics(student, teacher, columns=columns, temperature=temperature)
    rows = student.shape[0]
    result = torch.empty(2, 2, rows, device=student.device, dtype=torch.float32)
    with _on(student):
        _statistics[(rows,)](
            student, teacher, result, rows, *student.stride(), *teacher.stride(), columns, 1.0 / temperature,
            **_row_launch(student, columns),
        )  # fmt: skip
    return result


def divergences(student: Tensor, teacher: Tensor, lse: Tensor, *, columns: int, temperature: float) -> Tensor:
    """See :func:`.js_eager.divergences`."""
    if _left_to_eager(columns, student, teacher):
        return js_eager.divergences(student, teacher, lse, columns=columns, temperature=temperature)
    rows = student.shape[0]
    result = torch.empty(2, rows, device=student.device, dtype=torch.float32)
    with _on(student):
        _divergences[(rows,)](
            student, teacher, _vector(lse), result, rows, *student.stride(), *teacher.stride(), columns,
            1.0 / temperature, **_row_launch(student, columns),
        )  # fmt: skip
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
    """See :func:`.js_eager.gradient_`. A program takes one block of one row."""
    out = student if out is None else out
    if _left_to_eager(columns, student, teacher, out):
        return js_eager.gradient_(student, teacher, lse, kl, scale, columns=columns, temperature=temperature, out=out)
    launch = _block_launch(columns)
    with _on(student):
        _gradient[(student.shape[0], triton.cdiv(columns, launch["BLOCK"]))](
            student, teacher, out, _vector(lse), _vector(kl), _vector(scale) * (0.5 / temperature), student.shape[0],
            *student.stride(), *teacher.stride(), *out.stride(), columns, 1.0 / temperature, **launch,
        )  # fmt: skip
    out[:, columns:] = 0
    return out


def fused_(student: Tensor, teacher: Tensor, scale: Tensor, *, columns: int, temperature: float) -> Tensor:
    """See :func:`.js_eager.fused_`. A program takes a row, in three passes."""
    if _left_to_eager(columns, student, teacher):
        return js_eager.fused_(student, teacher, scale, columns=columns, temperature=temperature)
    rows = student.shape[0]
    values = torch.empty(rows, device=student.device, dtype=torch.float32)
    with _on(student):
        _fused[(rows,)](
            student, teacher, values, _vector(scale) * (0.5 / temperature), *student.stride(), *teacher.stride(),
            columns, 1.0 / temperature, **_row_launch(student, columns),
        )  # fmt: skip
    student[:, columns:] = 0
    return values


def _left_to_eager(columns: int, *logits: Tensor) -> bool:
    """Nothing to do, float64 (it is for proofs), or columns so far apart that offsets in a row exceed 32 bits."""
    if columns == 0 or logits[0].shape[0] == 0:
        return True
    return any(part.dtype not in DTYPES or part.stride(1) * columns >= 2**31 for part in logits)


def _vector(numbers: Tensor) -> Tensor:
    """fp32, one after the other: autograd hands over expanded scalars."""
    return numbers.to(torch.float32).contiguous()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# A thread takes 16 bytes of each tile at a time, the widest load. 32 warps (at most 64 registers a thread: on sm_90
# fused_ takes all of them) fill a multiprocessor with one row, which keeps the rows in flight few, because they compete
# for the second-level cache, and 32 kB of loads under way on each. Chosen from compiled code and arithmetic, not timed.
_WIDEST_LOAD = 16
_MOST_WARPS = 32


def _row_launch(student: Tensor, columns: int) -> dict[str, Any]:
    """Block and warps of the kernels that walk a row."""
    lanes = _WIDEST_LOAD // student.element_size()
    block = min(triton.next_power_of_2(columns), 32 * _MOST_WARPS * lanes)
    return _launch(block, block // (32 * lanes))


def _block_launch(columns: int) -> dict[str, Any]:
    """Block and warps where every block is a program of its own: enough programs, so small ones."""
    block = min(triton.next_power_of_2(columns), 2048)
    return _launch(block, block // 256)


def _launch(block: int, warps: int) -> dict[str, Any]:
    # Fused multiply-adds are a third of the instructions; newer Tritons do not make them unless asked.
    return {"BLOCK": block, "num_warps": min(max(warps, 1), _MOST_WARPS), "enable_fp_fusion": True}
