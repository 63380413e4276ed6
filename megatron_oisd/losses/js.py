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
from torch.autograd.function import once_differentiable

from megatron_oisd.losses import js_eager
from megatron_oisd.losses.js_topk import TopKTeacher, topk_rows_
from megatron_oisd.losses.numerics import Group, all_reduce_sum_, combine_log_sum_exp, group_size, upcast


@dataclass(frozen=True)
class HiddenTeacher:
    """The teacher as final hidden states; its logits are recomputed with the student's head, which is exact."""

    hidden: Tensor
    """``[N, h]`` after the final norm."""

    def rows(self, chosen: slice | Tensor) -> HiddenTeacher:
        """The rows of a chunk."""
        return HiddenTeacher(self.hidden[chosen])


@dataclass(frozen=True)
class LogitsTeacher:
    """The teacher as its logits."""

    logits: Tensor
    """``[N, v]`` this rank's vocabulary shard."""

    def rows(self, chosen: slice | Tensor) -> LogitsTeacher:
        """The rows of a chunk."""
        return LogitsTeacher(self.logits[chosen])


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
        gradient is that of this rank's shard of the student's logits; it has no derivative of its own.

    Raises:
        ValueError: shapes differ, ``valid_columns`` is not a part of the shard, or ``temperature`` is not positive.
    """
    _check_options(temperature, valid_columns, student_logits.shape[-1])
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
    @once_differentiable
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


@torch.no_grad()
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

    Raises:
        ValueError: shapes do not fit together, or an option is out of its range.
    """
    _check_options(temperature, valid_columns, head.shape[0])
    _check_lens(student_hidden, teacher, head, coefficients, chunk_tokens, head_gradient)
    columns = head.shape[0] if valid_columns is None else valid_columns
    hidden_gradient = upcast(student_hidden).new_empty(student_hidden.shape)
    values = hidden_gradient.new_empty(student_hidden.shape[0])
    scale = coefficients.to(values.dtype)
    # Reused: the chunk before would otherwise live until its successor's logits are there.
    rows = min(chunk_tokens, student_hidden.shape[0])
    own = head.new_empty(rows, head.shape[0])
    others = head.new_empty(rows, head.shape[0]) if isinstance(teacher, HiddenTeacher) else None
    for start in range(0, student_hidden.shape[0], chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        hidden = student_hidden[chunk]
        logits = torch.mm(hidden, head.t(), out=own[: len(hidden)])
        known = teacher.rows(chunk)
        if isinstance(known, TopKTeacher):
            values[chunk] = topk_rows_(
                logits, known, scale[chunk], columns=columns, temperature=temperature, group=group,
                first_token=first_token,
            )  # fmt: skip
        else:
            if isinstance(known, HiddenTeacher):
                assert others is not None
                theirs = torch.mm(known.hidden, head.t(), out=others[: len(hidden)])
            else:
                theirs = known.logits
            values[chunk] = _rows_(logits, theirs, scale[chunk], columns=columns, temperature=temperature, group=group)
        _product_(hidden_gradient[chunk], logits, head, beta=0)
        if head_gradient is not None:
            _product_(head_gradient, logits.t(), hidden, beta=1)
    all_reduce_sum_(hidden_gradient, group)
    return LensLoss(values, hidden_gradient.to(student_hidden.dtype))


def _check_options(temperature: float, valid_columns: int | None, width: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a positive number")
    if valid_columns is not None and not 0 <= valid_columns <= width:
        raise ValueError(f"valid_columns is {valid_columns}: expected 0 to {width}, the width of this vocabulary shard")


def _check_lens(
    hidden: Tensor,
    teacher: Teacher,
    head: Tensor,
    coefficients: Tensor,
    chunk_tokens: int,
    head_gradient: Tensor | None,
) -> None:
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: expected at least 1")
    tokens, width = hidden.shape
    rows = head.shape[0]
    parts = {"head": (head.shape, (rows, width)), "coefficients": (coefficients.shape, (tokens,))}
    if isinstance(teacher, HiddenTeacher):
        parts["the teacher's hidden states"] = (teacher.hidden.shape, (tokens, width))
    elif isinstance(teacher, LogitsTeacher):
        parts["the teacher's logits"] = (teacher.logits.shape, (tokens, rows))
    else:
        parts["the teacher's token ids"] = (teacher.token_ids.shape[:1], (tokens,))
    if head_gradient is not None:
        parts["head_gradient"] = (head_gradient.shape, (rows, width))
    for name, (found, expected) in parts.items():
        if found != expected:
            raise ValueError(
                f"{name}: shape {list(found)}, expected {list(expected)} for student_hidden {list(hidden.shape)} and "
                f"head {list(head.shape)}"
            )


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


_PRODUCT_ROWS = 4096


def _product_(total: Tensor, left: Tensor, right: Tensor, *, beta: int) -> None:
    """``total = beta * total + left @ right`` without a second buffer of its size; ``total`` may be the wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif _products_stay_wide(total.device, total.dtype, left.dtype):
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        for start in range(0, total.shape[0], _PRODUCT_ROWS):
            part = slice(start, start + _PRODUCT_ROWS)
            product = left[part] @ right
            if beta:
                total[part].add_(product)
            else:
                total[part] = product


@functools.cache
def _products_stay_wide(device: torch.device, wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether ``device`` adds a product of ``narrow`` matrices to a ``wide`` one, unrounded: CUDA with torch 2.8 on.

    Elsewhere each product is rounded to ``narrow`` first and added in a pass of its own.
    """
    if device.type != "cuda":
        return False
    total, ones = torch.ones(16, 16, device=device, dtype=wide), torch.ones(16, 16, device=device, dtype=narrow)
    try:
        torch.addmm(total, ones.t(), ones, out_dtype=wide, out=total)
    except (TypeError, RuntimeError):  # An older torch, a build without it.
        return False
    return bool((total == 17).all())


def linear_js_loss(
    student_hidden: Tensor,
    teacher: Teacher,
    head: Tensor,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    group: Group = None,
    chunk_tokens: int = 1024,
    valid_columns: int | None = None,
    first_token: int = 0,
) -> Tensor:
    """``sum_t weights_t * JS(p_t, sg(q_t))`` as an ordinary differentiable scalar, for use outside Megatron.

    The gradients of ``student_hidden`` and, where it requires one, ``head`` are made in the forward pass, chunk by
    chunk (see :func:`lens_js` for arguments, memory, collectives and errors; ``weights`` are its coefficients);
    backward multiplies them by the arriving gradient. Nothing else is differentiable, and nothing twice. Tokens of
    weight 0 are left out: whatever stands there, their gradient is 0.
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
        options: dict[str, Any] = {
            "temperature": temperature, "group": group, "chunk_tokens": chunk_tokens, "valid_columns": valid_columns,
            "first_token": first_token, "head_gradient": head_gradient,
        }  # fmt: skip
        kept = weights.nonzero().squeeze(-1)
        if len(kept) == len(hidden):
            loss = lens_js(hidden, teacher, head, weights, **options)
            gradient = loss.hidden_gradient
        else:
            _check_lens(hidden, teacher, head, weights, chunk_tokens, head_gradient)
            weights = weights[kept]
            loss = lens_js(hidden[kept], teacher.rows(kept), head, weights, **options)
            gradient = hidden.new_zeros(hidden.shape).index_copy_(0, kept, loss.hidden_gradient)
        ctx.save_for_backward(gradient, head_gradient)
        ctx.head_dtype = head.dtype
        return (weights.to(loss.values.dtype) * loss.values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head = ctx.saved_tensors
        factor = grad_outputs[0]
        if head is not None:
            total, head = head, head.new_empty(head.shape, dtype=ctx.head_dtype)
            # In parts: a CPU makes a product in fp32 before it rounds it.
            for start in range(0, head.shape[0], _PRODUCT_ROWS):
                part = slice(start, start + _PRODUCT_ROWS)
                head[part] = total[part] * factor
        return (hidden * factor).to(hidden.dtype), head, *[None] * 7
