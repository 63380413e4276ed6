r"""Vocabulary-parallel Jensen-Shannon divergence, and the logit-lens loss built on it.

Formula (OISD, "how to think"), with p the student's and q the teacher's distribution and m = (p + q) / 2, in nats:

    JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2

Gradient with respect to a student logit z_i (the teacher is detached), tau the temperature:

    dJS/dz_i = p_i / (2 tau) * (log(p_i / m_i) - KL(p || m))

KL(p || m) is over the *whole* vocabulary, so under vocabulary parallelism the reduced value must enter the gradient:
a shard's own partial sum gives the right loss and a wrong gradient. Shape legend: see :mod:`megatron_oisd.losses`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_oisd.losses import js_eager
from megatron_oisd.losses.js_topk import TopKTeacher, topk_rows_
from megatron_oisd.losses.numerics import Group, all_reduce_sum_, combine_log_sum_exp, group_size, upcast


@dataclass(frozen=True)
class HiddenTeacher:
    """The teacher as final hidden states; its logits are recomputed with the student's head, which is exact."""

    hidden: Tensor
    """``[N, h]`` after the final norm."""


@dataclass(frozen=True)
class LogitsTeacher:
    """The teacher as its logits."""

    logits: Tensor
    """``[N, v]`` this rank's vocabulary shard."""


Teacher = HiddenTeacher | LogitsTeacher | TopKTeacher


def vocab_parallel_js(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    group: Group = None,
    valid_columns: int | None = None,
) -> Tensor:
    """Jensen-Shannon divergence of each row, from vocabulary shards.

    Args:
        student_logits: ``[N, v]``, differentiable. ``-inf`` marks a column that is not there.
        teacher_logits: ``[N, v]``, same shard; treated as a constant.
        temperature: tau, applied to both.
        group: tensor-parallel group that shards the vocabulary; None for the whole vocabulary on this rank.
        valid_columns: leading columns of this shard that are real vocabulary; the rest is padding. None: all.

    Returns:
        ``[N]`` values in nats in [0, log 2], identical on every rank; fp32, or float64 for float64 logits.
        Collectives: forward one all-gather (``4 N`` numbers) and one all-reduce (``2 N``), backward none. The
        gradient is that of this rank's shard of the student's logits.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)} differ in "
            "shape: both must be the same rows and the same vocabulary shard"
        )
    return _VocabParallelJS.apply(student_logits, teacher_logits.detach(), temperature, group, valid_columns)


class _VocabParallelJS(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: Group, valid_columns: int | None
    ) -> Tensor:
        columns = student.shape[-1] if valid_columns is None else valid_columns
        options = {"columns": columns, "temperature": temperature}
        kernels = row_kernels(student)
        lse = combine_log_sum_exp(kernels.statistics(student, teacher, **options), group)
        kl = all_reduce_sum_(kernels.divergences(student, teacher, lse, **options), group)
        ctx.save_for_backward(student, teacher, lse, kl)
        ctx.kernels, ctx.options = kernels, options
        return kl.sum(0).mul_(0.5).clamp_min_(0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, lse, kl = ctx.saved_tensors
        gradient = ctx.kernels.gradient_(
            student, teacher, lse, kl[0], grad_outputs[0], out=torch.empty_like(student), **ctx.options
        )
        return gradient, None, None, None, None


_kernels = "auto"


@contextmanager
def use_kernels(name: Literal["auto", "eager", "triton"]) -> Iterator[None]:
    """Within it, take these row kernels (:func:`row_kernels`) in the whole process, autograd's threads included.

    For tests and benchmarks; ``auto`` is what holds elsewhere. ``triton`` on CPU needs Triton's interpreter, that is
    TRITON_INTERPRET=1 in the environment before triton is first imported, and raises without it.
    """
    global _kernels
    if name not in ("auto", "eager", "triton"):
        raise ValueError(f'kernels are {name!r}: expected "auto", "eager" or "triton"')
    before, _kernels = _kernels, name
    try:
        yield
    finally:
        _kernels = before


def row_kernels(logits: Tensor) -> Any:
    """The implementation of the row kernels for these logits: a module with the functions of :mod:`.js_eager`.

    Triton's for bf16, fp16 and fp32 on a GPU that it compiles for, else the eager ones. One warning tells where a GPU
    takes the eager ones for want of something. :func:`use_kernels` overrides.
    """
    if _kernels == "eager" or logits.dtype == torch.float64 or not (logits.is_cuda or _kernels == "triton"):
        return js_eager
    module, missing = _triton_kernels(logits.device)
    if missing is None:
        return module
    if _kernels == "triton":
        raise RuntimeError(f"the Triton kernels were asked for, but {missing}")
    _warn_once(
        f"the logit-lens loss takes its eager kernels on {logits.device}: {missing}. The results are the same, but the "
        "loss moves about ten times as much memory for every chunk of logits and needs fp32 blocks of working memory"
    )
    return js_eager


@functools.cache
def _triton_kernels(device: torch.device) -> tuple[Any, str | None]:
    """(the module of the Triton kernels, None), or (None, what is missing and how to mend it)."""
    try:
        from megatron_oisd.losses import js_triton
    except Exception as error:  # A broken installation raises whatever it likes.
        return None, f"importing triton failed ({type(error).__name__}: {error}); `pip install 'triton>=3.1'` mends it"
    if js_triton.INTERPRETED:
        return js_triton, None
    if device.type != "cuda":
        return None, f"on {device} they run in Triton's interpreter only: set TRITON_INTERPRET=1 before starting Python"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return None, "the GPU is older than compute capability 8.0 (Ampere); a newer one is the only remedy"
    return js_triton, None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class LensLoss:
    """What :func:`lens_js` returns."""

    values: Tensor
    """``[N]`` unweighted Jensen-Shannon divergence of each token, nats."""
    hidden_gradient: Tensor
    """``[N, h]`` gradient of ``sum(coefficients * values)`` w.r.t. the student's normed hidden states."""


def lens_js(
    student_hidden: Tensor,
    teacher: Teacher,
    head: Tensor,
    coefficients: Tensor,
    *,
    temperature: float,
    group: Group,
    chunk_tokens: int,
    valid_columns: int | None = None,
    first_token: int = 0,
    head_gradient: Tensor | None = None,
) -> LensLoss:
    """The logit-lens loss ``sum_t coefficients_t * JS(p_t, sg(q_t))`` with its gradients, chunked over tokens.

    Logits exist for one chunk at a time, their gradient is written over them and consumed at once: memory is two
    buffers of ``chunk_tokens * v`` numbers in the inputs' dtype and a few small blocks, whatever N is. Sums and
    exponentials are fp32 (float64 for float64 inputs).

    Args:
        student_hidden: ``[N, h]`` after the final norm; drop tokens of coefficient 0 before.
        teacher: what is known of the teacher; constant.
        head: ``[v, h]`` this rank's rows of the unembedding.
        coefficients: ``[N]`` signed weight of each token, everything included.
        temperature: tau.
        group: tensor-parallel group.
        chunk_tokens: tokens per chunk.
        valid_columns: leading rows of ``head`` that are real vocabulary; None: all.
        first_token: token id of this shard's first row; only a top-k teacher needs it.
        head_gradient: ``[v, h]`` buffer to which the head's gradient is added, or None where the head receives none.

    Returns:
        :class:`LensLoss`; the hidden gradient is complete (summed over the vocabulary shards) on every rank.
        Collectives: two for each chunk, one all-reduce of ``[N, h]`` at the end.
    """
    columns = head.shape[0] if valid_columns is None else valid_columns
    hidden_gradient = upcast(student_hidden).new_empty(student_hidden.shape)
    values = hidden_gradient.new_empty(student_hidden.shape[0])
    scale = coefficients.to(values.dtype)
    for start in range(0, student_hidden.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        hidden = student_hidden[chunk]
        logits = hidden @ head.t()
        if isinstance(teacher, TopKTeacher):
            values[chunk] = topk_rows_(
                logits, teacher.rows(chunk), scale[chunk], columns=columns, temperature=temperature, group=group,
                first_token=first_token,
            )  # fmt: skip
        else:
            theirs = teacher.hidden[chunk] @ head.t() if isinstance(teacher, HiddenTeacher) else teacher.logits[chunk]
            values[chunk] = _rows_(logits, theirs, scale[chunk], columns=columns, temperature=temperature, group=group)
        if logits.dtype == hidden_gradient.dtype:
            torch.mm(logits, head, out=hidden_gradient[chunk])
        else:
            hidden_gradient[chunk] = logits @ head
        if head_gradient is not None:
            _add_outer_(head_gradient, logits, hidden)
    all_reduce_sum_(hidden_gradient, group)
    return LensLoss(values, hidden_gradient.to(student_hidden.dtype))


def _rows_(
    student: Tensor, teacher: Tensor, scale: Tensor, *, columns: int, temperature: float, group: Group
) -> Tensor:
    """Values ``[n]``; ``scale * dJS/dz`` is written over the student's logits."""
    kernels = row_kernels(student)
    options: dict[str, Any] = {"columns": columns, "temperature": temperature}
    if group_size(group) == 1:
        return kernels.fused_(student, teacher, scale, **options)
    lse = combine_log_sum_exp(kernels.statistics(student, teacher, **options), group)
    kl = all_reduce_sum_(kernels.divergences(student, teacher, lse, **options), group)
    kernels.gradient_(student, teacher, lse, kl[0], scale, **options)
    return kl.sum(0).mul_(0.5).clamp_min_(0.0)


_OUTER_ROWS = 4096


def _add_outer_(total: Tensor, logits_gradient: Tensor, hidden: Tensor) -> None:
    """``total += logits_gradient^T hidden`` without a second ``[v, h]`` buffer."""
    if total.dtype == logits_gradient.dtype:
        total.addmm_(logits_gradient.t(), hidden)
        return
    for start in range(0, total.shape[0], _OUTER_ROWS):
        part = slice(start, start + _OUTER_ROWS)
        total[part].add_(logits_gradient[:, part].t() @ hidden)


def linear_js_loss(
    student_hidden: Tensor,
    teacher: Teacher,
    head: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    group: Group = None,
    chunk_tokens: int = 256,
    valid_columns: int | None = None,
    first_token: int = 0,
) -> Tensor:
    """``sum_t weights_t * JS(p_t, sg(q_t))`` as an ordinary differentiable scalar, for use outside Megatron.

    The gradients of ``student_hidden`` and, where it requires one, ``head`` are made in the forward pass, chunk by
    chunk (see :func:`lens_js` for arguments, memory and collectives); backward multiplies them by the arriving
    gradient. Nothing else is differentiable.
    """
    return _LinearJS.apply(
        student_hidden, head, teacher, weights, temperature, group, chunk_tokens, valid_columns, first_token
    )


class _LinearJS(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher: Teacher,
        weights: Tensor,
        temperature: float,
        group: Group,
        chunk_tokens: int,
        valid_columns: int | None,
        first_token: int,
    ) -> Tensor:
        head_gradient = upcast(head.new_empty(0)).new_zeros(head.shape) if ctx.needs_input_grad[1] else None
        loss = lens_js(
            hidden, teacher, head, weights, temperature=temperature, group=group, chunk_tokens=chunk_tokens,
            valid_columns=valid_columns, first_token=first_token, head_gradient=head_gradient,
        )  # fmt: skip
        ctx.save_for_backward(loss.hidden_gradient, head_gradient)
        ctx.head_dtype = head.dtype
        return (weights.to(loss.values.dtype) * loss.values).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head = ctx.saved_tensors
        factor = grad_outputs[0]
        if head is not None:
            # Rounded on the way: no second buffer of the head's size in fp32.
            head = torch.mul(head, factor, out=head.new_empty(head.shape, dtype=ctx.head_dtype))
        return (hidden * factor).to(hidden.dtype), head, *[None] * 7
