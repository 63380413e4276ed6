r"""Vocabulary-parallel Jensen-Shannon divergence, and the logit-lens loss built on it.

Formula (OISD, "how to think"), with p the student's and q the teacher's distribution and m = (p + q) / 2, in nats:

    JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2

Gradient with respect to a student logit z_i (the teacher is detached), tau the temperature:

    dJS/dz_i = p_i / (2 tau) * (log(p_i / m_i) - KL(p || m))

KL(p || m) is over the *whole* vocabulary, so under vocabulary parallelism the reduced value must enter the gradient:
a shard's own partial sum gives the right loss and a wrong gradient. Shape legend: see :mod:`megatron_oisd.losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.losses.numerics import Group, all_reduce_sum_, log_sum_exp, upcast


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
        values, gradient = _rows(student, teacher, temperature, group, valid_columns, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0].unsqueeze(-1) * gradient).to(ctx.dtype), None, None, None, None


def _rows(
    student: Tensor, teacher: Tensor, temperature: float, group: Group, valid_columns: int | None, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Values ``[N]`` and, if asked for, the gradient of each row's value ``[N, v]`` (zero in padded columns)."""
    width = student.shape[-1]
    columns = width if valid_columns is None else valid_columns
    logits = torch.stack([upcast(student[:, :columns]), upcast(teacher[:, :columns])]).div_(temperature)
    log_p, log_q = logits.sub_(log_sum_exp(logits, group).unsqueeze(-1))
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2.0))
    # A column without mass adds nothing; -inf minus -inf must not become NaN.
    no_q, q = torch.isneginf(log_q), log_q.exp()
    kl_q = torch.linalg.vecdot(q, log_q.sub_(log_m).masked_fill_(no_q, 0.0))
    no_p, p = torch.isneginf(log_p), torch.exp(log_p, out=q)
    p_excess = log_p.sub_(log_m).masked_fill_(no_p, 0.0)
    kl = all_reduce_sum_(torch.stack([torch.linalg.vecdot(p, p_excess), kl_q]), group)
    # Rounding can leave a sum just below zero where both distributions are equal.
    values = (0.5 * (kl[0] + kl[1])).clamp_min(0.0)
    if not need_gradient:
        return values, None
    gradient = p.mul_(p_excess.sub_(kl[0].unsqueeze(-1))).mul_(0.5 / temperature)
    if columns < width:
        gradient = torch.nn.functional.pad(gradient, (0, width - columns))
    return values, gradient


@dataclass(frozen=True)
class LensLoss:
    """What :func:`lens_js` returns."""

    values: Tensor
    """``[N]`` unweighted Jensen-Shannon divergence of each token, nats."""
    hidden_gradient: Tensor
    """``[N, h]`` gradient of ``sum(coefficients * values)`` w.r.t. the student's normed hidden states."""


def lens_js(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Tensor,
    coefficients: Tensor,
    *,
    temperature: float,
    group: Group,
    chunk_tokens: int,
    valid_columns: int | None = None,
    head_gradient: Tensor | None = None,
) -> LensLoss:
    """The logit-lens loss ``sum_t coefficients_t * JS(p_t, sg(q_t))`` with its gradients, chunked over tokens.

    Logits exist for one chunk at a time and their gradient is consumed at once, so memory is bounded by about six
    buffers of ``chunk_tokens * v`` numbers instead of ``N * v``. The teacher's logits are recomputed from its normed
    hidden states with the same head: exact, and ``V / (TP * h)`` times fewer numbers to send.

    Args:
        student_hidden: ``[N, h]`` after the final norm.
        teacher_hidden: ``[N, h]`` after the final norm; constant.
        head: ``[v, h]`` this rank's rows of the unembedding.
        coefficients: ``[N]`` signed weight of each token, everything included.
        temperature: tau.
        group: tensor-parallel group.
        chunk_tokens: tokens per chunk.
        valid_columns: leading rows of ``head`` that are real vocabulary; None: all.
        head_gradient: ``[v, h]`` buffer to which the head's gradient is added, or None where the head receives none.

    Returns:
        :class:`LensLoss`; the hidden gradient is complete (summed over the vocabulary shards) on every rank.
        Collectives: two for each chunk, one all-reduce of ``[N, h]`` at the end.
    """
    values, gradients = [], []
    for start in range(0, student_hidden.shape[0], chunk_tokens):
        stop = start + chunk_tokens
        hidden = student_hidden[start:stop]
        value, gradient = _rows(
            hidden @ head.t(), teacher_hidden[start:stop] @ head.t(), temperature, group, valid_columns, True
        )
        assert gradient is not None
        gradient.mul_(coefficients[start:stop].unsqueeze(-1))
        gradient = gradient.to(head.dtype)
        values.append(value)
        gradients.append(upcast(gradient @ head))
        if head_gradient is not None:
            head_gradient.add_(gradient.t() @ hidden)
    if not values:
        empty = upcast(student_hidden)
        return LensLoss(empty.new_zeros(0), empty.new_zeros(0, student_hidden.shape[1]))
    total = all_reduce_sum_(torch.cat(gradients), group)
    return LensLoss(torch.cat(values), total.to(student_hidden.dtype))
