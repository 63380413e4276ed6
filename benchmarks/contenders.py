"""The losses that are compared: each computes ``mean over tokens of JS(p, sg(q))`` and the gradients it needs.

All get the same inputs. Weights are uniform, since Liger-Kernel has no weights of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.losses.js import HiddenTeacher, LogitsTeacher, lens_js, linear_js_loss
from megatron_oisd.losses.js_topk import TopKTeacher, make_topk_teacher
from megatron_oisd.losses.reference import jensen_shannon

TOP_K = 256


@dataclass(frozen=True)
class Case:
    """Sizes of a comparison."""

    tokens: int
    """N"""
    vocabulary: int
    """V"""
    hidden: int
    """h"""
    dtype: torch.dtype
    device: str = "cpu"
    head_gradient: bool = True

    @property
    def product_flops(self) -> int:
        """Floating-point operations of one product of hidden states and head."""
        return 2 * self.tokens * self.vocabulary * self.hidden


@dataclass
class Inputs:
    """Tensors of a case."""

    student: Tensor
    """``[N, h]``"""
    teacher: Tensor
    """``[N, h]``"""
    head: Tensor
    """``[V, h]``"""
    weights: Tensor
    """``[N]``"""
    main_grad: Tensor | None = None
    """``[V, h]`` fp32, Megatron's gradient buffer of the head, for the contender that adds to it."""
    teacher_logits: Tensor | None = None
    """``[N, V]``, for contenders that receive logits."""
    topk: TopKTeacher | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors that exist before the loss is called."""
        own = [self.student, self.teacher, self.head, self.weights, self.main_grad, self.teacher_logits]
        own += [] if self.topk is None else [self.topk.log_probs, self.topk.token_ids]
        return [tensor for tensor in own if tensor is not None]


def make_inputs(case: Case, *, teacher: str = "hidden", main_grad: bool = False) -> Inputs:
    """Random inputs; logits have a standard deviation of 2, those of the teacher correlate with the student's."""
    options: dict[str, Any] = {"dtype": case.dtype, "device": case.device}
    if case.device != "cuda":
        torch.manual_seed(0)
    student = torch.randn(case.tokens, case.hidden, **options)
    hidden_teacher = (0.8 * student + 0.6 * torch.randn(case.tokens, case.hidden, **options)).requires_grad_(False)
    head = torch.randn(case.vocabulary, case.hidden, **options).mul_(2.0 / case.hidden**0.5)
    weights = torch.full((case.tokens,), 1.0 / case.tokens, device=case.device)
    inputs = Inputs(student.requires_grad_(), hidden_teacher, head.requires_grad_(case.head_gradient), weights)
    if main_grad:
        inputs.main_grad = torch.zeros(case.vocabulary, case.hidden, device=case.device)
    with torch.no_grad():
        if teacher == "logits":
            inputs.teacher_logits = hidden_teacher @ head.t()
        elif teacher == "topk":
            inputs.topk = make_topk_teacher(hidden_teacher @ head.t(), min(TOP_K, case.vocabulary), temperature=1.0)
    return inputs


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation."""

    loss: Loss
    teacher: str = "hidden"
    products: int = 4
    """Matrix products of forward and backward with the head's gradient: student, teacher, two gradients."""
    main_grad: bool = False
    exact: bool = True
    """Whether it computes JS, so that its gradient can be compared."""


def _ours(x: Inputs) -> Tensor:
    return linear_js_loss(x.student, HiddenTeacher(x.teacher), x.head, x.weights)


def _ours_main_grad(x: Inputs) -> Tensor:
    """As the pipeline calls it: gradients are made at once, the head's is added to an existing buffer."""
    loss = lens_js(
        x.student.detach(), HiddenTeacher(x.teacher), x.head.detach(), x.weights, temperature=1.0, group=None,
        chunk_tokens=OISDConfig.chunk_tokens, head_gradient=x.main_grad if x.head.requires_grad else None,
    )  # fmt: skip
    x.student.grad = loss.hidden_gradient
    return (x.weights * loss.values).sum()


def _ours_logits(x: Inputs) -> Tensor:
    assert x.teacher_logits is not None
    return linear_js_loss(x.student, LogitsTeacher(x.teacher_logits), x.head, x.weights)


def _ours_topk(x: Inputs) -> Tensor:
    assert x.topk is not None
    return linear_js_loss(x.student, x.topk, x.head, x.weights)


def _naive(x: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = (x.teacher @ x.head.t()).float()
    return (x.weights * jensen_shannon((x.student @ x.head.t()).float(), teacher)).sum()


def _compiled() -> Loss:
    function = torch.compile(
        lambda student, teacher, head, weights: _naive(Inputs(student, teacher, head, weights)), dynamic=False
    )
    return lambda x: function(x.student, x.teacher, x.head, x.weights)


def _liger(compiled: bool) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)

    def loss(x: Inputs) -> Tensor:
        labels = torch.zeros(x.student.shape[0], dtype=torch.long, device=x.student.device)
        return module(x.student, x.head, x.teacher, x.head, labels)

    return loss


def _trl() -> Loss:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(x: Inputs) -> Tensor:
        with torch.no_grad():
            teacher = (x.teacher @ x.head.t()).float()
        student = (x.student @ x.head.t()).float()
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5, reduction="sum") / student.shape[0]

    return loss


_MAKERS: dict[str, Callable[[], Contender]] = {
    "ours, hidden teacher": lambda: Contender(_ours),
    "ours, into main_grad": lambda: Contender(_ours_main_grad, main_grad=True),
    "ours, logits teacher": lambda: Contender(_ours_logits, teacher="logits", products=3),
    f"ours, top-{TOP_K} teacher": lambda: Contender(_ours_topk, teacher="topk", products=3, exact=False),
    "naive fp32": lambda: Contender(_naive),
    "torch.compile of naive": lambda: Contender(_compiled()),
    "Liger, compiled": lambda: Contender(_liger(compiled=True)),
    "Liger, eager": lambda: Contender(_liger(compiled=False)),
    "TRL": lambda: Contender(_trl()),
}
NAMES = tuple(_MAKERS)


def make_contender(name: str) -> Contender:
    """The contender of that name; ImportError where its package is not installed."""
    return _MAKERS[name]()


def run(contender: Contender, inputs: Inputs, between: Callable[[], None] = lambda: None) -> Tensor:
    """Forward, ``between``, backward; gradients are left in ``.grad`` of the leaves."""
    inputs.student.grad = inputs.head.grad = None
    loss = contender.loss(inputs)
    between()
    if loss.requires_grad:
        # A constant that FakeTensor knows: Liger's backward looks at its value.
        loss.backward(torch.tensor(1.0, dtype=loss.dtype, device=loss.device))
    return loss.detach()


def products_step(inputs: Inputs, products: int) -> Callable[[Callable[[], None]], None]:
    """Only the matrix products that a contender cannot do without: the roofline, measured."""
    student, teacher, head = inputs.student.detach(), inputs.teacher, inputs.head.detach()
    gradient = torch.randn(student.shape[0], head.shape[0], dtype=student.dtype, device=student.device)
    logits = torch.empty_like(gradient)
    hidden_gradient, head_gradient = torch.empty_like(student), torch.empty_like(head)

    def step(between: Callable[[], None]) -> None:
        torch.mm(student, head.t(), out=logits)
        if products > 3:
            torch.mm(teacher, head.t(), out=logits)
        between()
        torch.mm(gradient, head, out=hidden_gradient)
        if inputs.head.requires_grad:
            torch.mm(gradient.t(), student, out=head_gradient)

    return step
