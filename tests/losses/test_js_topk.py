"""The top-k teacher: what it loses is bounded, what it computes is exact for the coarsened events, TP 1 and 2.

The bound. Draw Z in {p, q} with probability 1/2 each, then a token X from it; E is X with the tail merged. Then
JS = I(Z; X) = I(Z; E) + I(Z; X | E), and I(Z; E) = JS_k. Given an event of one token nothing is left, so with
t_p, t_q the tail masses and M = (t_p + t_q) / 2 the tail's mass in the mixture

    0 <= JS - JS_k = M I(Z; X | tail) <= M H(Z | tail) = M H_2(t_p / (t_p + t_q)) <= M log 2
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oisd.losses.js import lens_js
from megatron_oisd.losses.js_topk import TopKTeacher, make_topk_teacher, topk_rows_
from megatron_oisd.losses.reference import jensen_shannon
from tests.helpers.ranks import run_ranks


def _logits(rows, columns, scale, seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, columns, generator=generator, dtype=torch.float64) * scale


def _js_topk(student, teacher, temperature=1.0, scale=None):
    """Values and ``scale * dJS_k/dz`` by the code under test."""
    gradient = student.detach().clone()
    scale = torch.ones(len(student), dtype=student.dtype) if scale is None else scale
    values = topk_rows_(
        gradient, teacher, scale, columns=student.shape[1], temperature=temperature, group=None, first_token=0
    )
    return values, gradient


def _events(log_probs, ids):
    """The k tokens' probabilities and the sum of all others."""
    probs = log_probs.exp()
    return torch.cat([probs.gather(-1, ids), probs.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], dim=-1)


def _coarse_js(student, teacher_logits, ids, temperature):
    """JS_k written down for plain autograd."""
    p = _events(torch.log_softmax(student / temperature, -1), ids)
    q = _events(torch.log_softmax(teacher_logits / temperature, -1), ids)
    if ids.shape[1] == student.shape[1]:  # no tail: 0/0 has no gradient
        p, q = p[:, :-1], q[:, :-1]
    m = (p + q) / 2
    return (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1) / 2


CASES = {
    "rows": st.integers(1, 4), "columns": st.integers(1, 24), "fraction": st.floats(0.0, 1.0),
    "scale": st.sampled_from([0.0, 0.3, 2.0, 8.0]), "temperature": st.sampled_from([0.5, 1.0, 2.0]),
    "seed": st.integers(0, 10_000),
}  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(**CASES)
def test_never_above_js_and_below_it_by_the_tails_entropy_at_most(rows, columns, fraction, scale, temperature, seed):
    student, logits = _logits(rows, columns, scale, seed)
    k = max(1, round(fraction * columns))
    teacher = make_topk_teacher(logits, k, temperature=temperature)
    values, _ = _js_topk(student, teacher, temperature)
    lost = jensen_shannon(student, logits, temperature) - values
    tail_p, tail_q = (
        _events(torch.log_softmax(z / temperature, -1), teacher.token_ids)[:, -1] for z in (student, logits)
    )
    mass = (tail_p + tail_q) / 2
    share = tail_p / (2 * mass).clamp_min(1e-300)
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    assert (values >= 0).all()
    assert (lost >= -1e-12).all()
    assert (lost <= mass * entropy + 1e-12).all()
    assert (lost <= math.log(2) * mass + 1e-12).all()


def test_the_bound_is_reached_by_tails_that_share_no_token():
    """The tail of p and of q lie on different tokens, with the same mass: all that is lost is log 2 times that mass."""
    p, q = torch.tensor([[0.6, 0.4, 0.0]]).double(), torch.tensor([[0.6, 0.0, 0.4]]).double()
    values, _ = _js_topk(p.log(), make_topk_teacher(q.log(), 1, temperature=1.0))
    assert values.item() == pytest.approx(0.0, abs=1e-12)
    exact = 0.4 * math.log(2)  # JS(p, q): the terms of tokens 1 and 2 are 0.2 log 2 each
    assert exact == pytest.approx(math.log(2) * (0.4 + 0.4) / 2)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_gradient_is_plain_autograds_of_the_coarsened_loss(rows, columns, fraction, scale, temperature, seed):
    student, logits = _logits(rows, columns, scale, seed)
    teacher = make_topk_teacher(logits, max(1, round(fraction * columns)), temperature=temperature)
    weights = torch.linspace(-1.0, 1.5, rows, dtype=torch.float64)
    values, gradient = _js_topk(student, teacher, temperature, weights)
    leaf = student.clone().requires_grad_()
    expected = _coarse_js(leaf, logits, teacher.token_ids, temperature)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-8, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), leaf)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_k_of_the_whole_vocabulary_is_js(temperature):
    student, logits = _logits(5, 19, 3.0, seed=3)
    values, gradient = _js_topk(student, make_topk_teacher(logits, 19, temperature=temperature), temperature)
    leaf = student.clone().requires_grad_()
    expected = jensen_shannon(leaf, logits, temperature)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])


def test_an_empty_tail_is_js():
    student, logits = _logits(4, 12, 2.0, seed=4)
    student[:, 5:] = logits[:, 5:] = -torch.inf
    values, gradient = _js_topk(student, make_topk_teacher(logits, 5, temperature=1.0))
    torch.testing.assert_close(values, jensen_shannon(student[:, :5], logits[:, :5]))
    assert (gradient[:, 5:] == 0).all()


def test_k_above_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="k is 8"):
        make_topk_teacher(torch.zeros(2, 7), 8, temperature=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked_and_flat_rows_stay_finite(dtype):
    student = torch.tensor([[1e4, 0.0, -1e4, 0.0], [0.0, 0.0, 0.0, 0.0], [-1e4, 1e4, 0.0, 0.0]], dtype=dtype)
    teacher = make_topk_teacher(student.flip(0), 2, temperature=1.0)
    values, gradient = _js_topk(student, teacher, scale=torch.ones(3))
    assert torch.isfinite(gradient).all()
    assert ((values >= 0) & (values <= math.log(2) + 1e-6)).all()
    assert gradient.dtype is dtype


# ---------------------------------------------------------------------------------------------------------- from shards

VOCABULARY, HIDDEN, TOKENS, TEMPERATURE = 14, 5, 9, 0.8


def _tensors():
    generator = torch.Generator().manual_seed(12)
    student, teacher = torch.randn(2, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    return student, teacher, head, torch.linspace(-1, 1, TOKENS, dtype=torch.float64)


def _sharded(k, valid):
    import torch.distributed as dist

    from megatron_oisd.runtime import distributed

    distributed.initialize(tensor_parallel=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    width = VOCABULARY // world
    first, columns = rank * width, min(max(valid - rank * width, 0), width)
    student, teacher, head, coefficients = _tensors()
    own = head[first : first + width]
    chosen = make_topk_teacher(
        teacher @ own.t(), k, temperature=TEMPERATURE, group=dist.group.WORLD, first_token=first, valid_columns=columns
    )
    head_gradient = torch.zeros_like(own)
    loss = lens_js(
        student, chosen, own, coefficients, temperature=TEMPERATURE, group=dist.group.WORLD, chunk_tokens=4,
        valid_columns=columns, first_token=first, head_gradient=head_gradient,
    )  # fmt: skip
    distributed.shutdown()
    return chosen, loss.values, loss.hidden_gradient, head_gradient


@pytest.mark.parametrize(("k", "valid"), [(3, 14), (9, 14), (14, 14), (5, 6)])
def test_shards_give_the_whole_vocabularys_teacher_values_and_gradients(k, valid):
    """k 9 is larger than a shard's 7 columns; with 6 valid columns the second shard has none at all."""
    results = run_ranks(2, _sharded, k, valid)
    student, teacher, head, coefficients = _tensors()
    logits = teacher @ head[:valid].t()
    whole = make_topk_teacher(logits, k, temperature=TEMPERATURE)
    leaf, head_leaf = student.requires_grad_(), head.requires_grad_()
    expected = _coarse_js(leaf @ head_leaf[:valid].t(), logits, whole.token_ids, TEMPERATURE)
    hidden_gradient, head_gradient = torch.autograd.grad((coefficients * expected).sum(), (leaf, head_leaf))
    for chosen, values, gradient, _ in results:
        torch.testing.assert_close(chosen.log_probs, whole.log_probs)
        assert torch.equal(chosen.token_ids, whole.token_ids)
        torch.testing.assert_close(values, expected.detach())
        torch.testing.assert_close(gradient, hidden_gradient)
    torch.testing.assert_close(torch.cat([result[3] for result in results]), head_gradient)


def test_rows_are_taken_by_chunk():
    teacher = TopKTeacher(torch.arange(6.0).view(3, 2), torch.arange(6).view(3, 2))
    assert teacher.rows(slice(1, 3)).token_ids.tolist() == [[2, 3], [4, 5]]
