"""The Jensen-Shannon loss against implementations by others, on the same inputs: values and gradients.

Skipped where the other package is not installed; docs/benchmarks.md says how to install them beside a CPU torch.

* Liger-Kernel's chunked JSD: mean over tokens, the same temperature for both, no factor tau^2. It has no weights of
  tokens, so weights here are uniform or 0/1 (its labels' ignore index); it always makes the head's gradient.
* TRL's generalized JSD: on logits; ``reduction="none"`` leaves the vocabulary axis; ``"batchmean"`` divides by the size
  of the first axis, ``"mean"`` by that of the vocabulary too.
* ModelOpt's Megatron loss is a KL divergence. dJS/dz is half of dKL(p || sg(m))/dz, its reverse form with log m as the
  target, and JS is half the sum of that and KL(sg(q) || m). It does not multiply by tau^2; its other loss,
  ``LogitsDistillationLoss``, does.

None of the three has signed weights of tokens, and the first two see the whole vocabulary only.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from megatron_oisd.losses.js import HiddenTeacher, linear_js_loss, vocab_parallel_js

ROWS, COLUMNS, HIDDEN = 11, 37, 6


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(21)
    student, teacher = torch.randn(2, ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(COLUMNS, HIDDEN, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), head.to(dtype).requires_grad_()


# ---------------------------------------------------------------------------------------------------------------- Liger


def _liger(temperature, chunk_size):
    module = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="needs liger-kernel", exc_type=ImportError
    ).LigerFusedLinearJSDLoss
    return module(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, temperature=temperature, compiled=False,
        chunk_size=chunk_size,
    )  # fmt: skip


@pytest.mark.parametrize("ignored", [0, 4])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_liger_agrees_in_value_and_in_the_gradients_of_hidden_states_and_head(dtype, tolerance, temperature, ignored):
    liger = _liger(temperature, chunk_size=4)
    student, teacher, head = _inputs(dtype)
    labels = torch.zeros(ROWS, dtype=torch.long)
    labels[:ignored] = -100
    theirs = liger(student, head, teacher, head.detach(), labels)
    expected = torch.autograd.grad(theirs, (student, head))
    weights = (labels != -100).to(dtype) / (ROWS - ignored)
    ours = linear_js_loss(student, HiddenTeacher(teacher), head, weights, temperature=temperature, chunk_tokens=4)
    # Liger keeps its running sum in fp32 whatever the inputs' dtype, so its value is good to fp32 only.
    torch.testing.assert_close(ours, theirs.detach().to(ours.dtype), rtol=2e-6, atol=1e-7)
    for own, other in zip(torch.autograd.grad(ours, (student, head)), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


# ------------------------------------------------------------------------------------------------------------------ TRL


def _trl():
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    for module in ("trl.experimental.gkd.gkd_trainer", "trl.trainer.gkd_trainer"):  # moved in trl 0.25
        try:
            return __import__(module, fromlist=["GKDTrainer"]).GKDTrainer.generalized_jsd_loss
        except (ImportError, RuntimeError):
            continue
    pytest.skip("needs trl with its GKDTrainer, accelerate and datasets")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_trl_agrees_in_every_tokens_value_and_gradient(temperature):
    theirs = _trl()
    student, teacher, head = _inputs()
    logits = (student @ head.t()).detach().requires_grad_()
    teacher_logits = (teacher @ head.t()).detach()
    weights = torch.linspace(-1.0, 1.5, ROWS, dtype=torch.float64)
    expected = theirs(logits, teacher_logits, beta=0.5, temperature=temperature, reduction="none").sum(-1)
    ours = vocab_parallel_js(logits, teacher_logits, temperature=temperature)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-13)
    (own,) = torch.autograd.grad((weights * ours).sum(), logits)
    (other,) = torch.autograd.grad((weights * expected).sum(), logits)
    torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-13)


def test_trl_reductions_in_terms_of_ours():
    theirs = _trl()
    student, teacher = torch.randn(2, 3, 4, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.zeros(3, 4, dtype=torch.long)
    labels[0, :3] = -100
    values = vocab_parallel_js(student.flatten(0, 1), teacher.flatten(0, 1)).view(3, 4)
    torch.testing.assert_close(theirs(student, teacher, reduction="sum"), values.sum())
    torch.testing.assert_close(theirs(student, teacher, reduction="mean"), values.mean() / COLUMNS)
    # Without labels "batchmean" divides by sequences, with labels by tokens.
    torch.testing.assert_close(theirs(student, teacher), values.sum() / 3)
    torch.testing.assert_close(theirs(student, teacher, labels=labels), values[labels == 0].mean())


# ------------------------------------------------------------------------------------------------------------- ModelOpt


def _modelopt(name, module):
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs nvidia-modelopt: {error}")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_modelopts_reverse_kl_to_the_mixture_has_twice_our_gradient(temperature):
    loss = _modelopt("LogitsKLLoss", "modelopt.torch.distill.plugins.megatron")
    config = type("Config", (), {"tensor_model_parallel_size": 1})()
    student, teacher, head = _inputs(torch.float32)
    logits = (student @ head.t()).detach().requires_grad_()
    teacher_logits = (teacher @ head.t()).detach()
    log_p, log_q = (torch.log_softmax(z.detach() / temperature, -1) for z in (logits, teacher_logits))
    mixture = temperature * (torch.logaddexp(log_p, log_q) - math.log(2))

    def kl(predictions, targets, *, reverse):
        function = loss(config, temperature=temperature, reverse=reverse)
        return function(predictions.unsqueeze(1), targets.unsqueeze(1))[0].squeeze(0)

    of_student, of_teacher = kl(logits, mixture, reverse=True), kl(mixture, teacher_logits, reverse=False)
    ours = vocab_parallel_js(logits, teacher_logits, temperature=temperature)
    torch.testing.assert_close(ours, (of_student + of_teacher).detach() / 2, rtol=1e-5, atol=1e-6)
    (own,) = torch.autograd.grad(ours.sum(), logits)
    (other,) = torch.autograd.grad(of_student.sum() / 2, logits)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_modelopts_other_loss_carries_the_square_of_the_temperature():
    loss = _modelopt("LogitsDistillationLoss", "modelopt.torch.distill.losses")
    student, teacher, head = _inputs()
    logits, teacher_logits = (student @ head.t()).detach(), (teacher @ head.t()).detach()
    temperature = 2.0
    log_p, log_q = (torch.log_softmax(z / temperature, -1) for z in (logits, teacher_logits))
    mixture = temperature * (torch.logaddexp(log_p, log_q) - math.log(2))
    function = loss(temperature=temperature, reduction="none")
    both = (function(mixture, logits) + function(mixture, teacher_logits)) / 2
    torch.testing.assert_close(
        both, temperature**2 * vocab_parallel_js(logits, teacher_logits, temperature=temperature)
    )
