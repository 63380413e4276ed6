"""The vocabulary-parallel JS against the reference: values and gradients, odd shapes, extremes, TP 1/2/4."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oisd.losses.js import HiddenTeacher, lens_js, vocab_parallel_js
from megatron_oisd.losses.reference import jensen_shannon
from tests.helpers.ranks import run_ranks


def _gradient(function, logits):
    leaf = logits.clone().requires_grad_()
    values = function(leaf)
    weights = torch.linspace(-1.0, 1.5, values.shape[0], dtype=values.dtype)
    (gradient,) = torch.autograd.grad((values * weights).sum(), leaf)
    return values.detach(), gradient


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5), columns=st.integers(1, 33), scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_equals_the_reference(rows, columns, scale, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) * scale
    value, gradient = _gradient(lambda z: vocab_parallel_js(z, teacher, temperature=temperature), student)
    expected, expected_gradient = _gradient(lambda z: jensen_shannon(z, teacher, temperature), student)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-13)


def test_gradcheck():
    student, teacher = torch.randn(2, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda z: vocab_parallel_js(z, teacher, temperature=0.7), (student.requires_grad_(),)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype):
    size = 6e4 if dtype is torch.float16 else 1e4
    student = torch.tensor([[size, 0.0, -size], [0.0, 0.0, 0.0], [-size, size, 0.0]], dtype=dtype)
    teacher = torch.tensor([[-size, 0.0, size], [0.0, 0.0, 0.0], [-size, size, 0.0]], dtype=dtype)
    value, gradient = _gradient(lambda z: vocab_parallel_js(z, teacher, temperature=1.0), student)
    torch.testing.assert_close(value, torch.tensor([math.log(2.0), 0.0, 0.0]), atol=1e-6, rtol=0.0)
    assert value.dtype is torch.float32
    assert gradient.dtype is dtype
    assert torch.isfinite(gradient).all()


def test_padded_columns_do_not_exist():
    student, teacher = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value, gradient = _gradient(lambda z: vocab_parallel_js(z, teacher, temperature=1.0, valid_columns=9), student)
    expected, expected_gradient = _gradient(lambda z: jensen_shannon(z, teacher[:, :9]), student[:, :9])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :9], expected_gradient)
    assert (gradient[:, 9:] == 0).all()


def test_a_different_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 4\]"):
        vocab_parallel_js(torch.zeros(2, 3), torch.zeros(2, 4), temperature=1.0)


def _sharded(vocabulary, valid):
    import torch.distributed as dist

    from megatron_oisd.runtime import distributed

    distributed.initialize(tensor_parallel=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 6, vocabulary, generator=generator, dtype=torch.float64) * 3
    width = vocabulary // world
    part = slice(rank * width, (rank + 1) * width)
    columns = min(max(valid - rank * width, 0), width)
    value, gradient = _gradient(
        lambda z: vocab_parallel_js(z, teacher[:, part], temperature=0.8, group=group, valid_columns=columns),
        student[:, part],
    )
    generator = torch.Generator().manual_seed(8)
    hidden, hidden_teacher = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, 5, generator=generator, dtype=torch.float64)
    coefficients = torch.linspace(-1, 1, 9, dtype=torch.float64)
    head_gradient = torch.zeros(width, 5, dtype=torch.float64)
    loss = lens_js(
        hidden, HiddenTeacher(hidden_teacher), head[part], coefficients, temperature=0.8, group=group, chunk_tokens=4,
        valid_columns=columns, head_gradient=head_gradient,
    )  # fmt: skip
    distributed.shutdown()
    return value, gradient, loss.values, loss.hidden_gradient, head_gradient


@pytest.mark.parametrize(("world", "valid"), [(2, 16), (4, 16), (4, 9)])
def test_shards_give_the_whole_vocabularys_values_and_gradients(world, valid):
    """valid 9 of 16 over 4 ranks: one shard is cut, one has no valid column at all."""
    results = run_ranks(world, _sharded, 16, valid)
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 6, 16, generator=generator, dtype=torch.float64) * 3
    expected, expected_gradient = _gradient(lambda z: jensen_shannon(z, teacher[:, :valid], 0.8), student[:, :valid])
    for value, *_ in results:
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.cat([r[1] for r in results], dim=1)[:, :valid], expected_gradient)

    generator = torch.Generator().manual_seed(8)
    hidden, hidden_teacher = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    head = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    leaf, head_leaf = hidden.requires_grad_(), head.requires_grad_()
    rows = jensen_shannon(leaf @ head_leaf[:valid].t(), hidden_teacher @ head_leaf[:valid].t(), 0.8)
    coefficients = torch.linspace(-1, 1, 9, dtype=torch.float64)
    expected_hidden, expected_head = torch.autograd.grad((coefficients * rows).sum(), (leaf, head_leaf))
    for result in results:
        torch.testing.assert_close(result[2], rows.detach())
        torch.testing.assert_close(result[3], expected_hidden)
    torch.testing.assert_close(torch.cat([r[4] for r in results]), expected_head)


def test_no_tokens_is_no_loss():
    nothing, head = torch.zeros(0, 5), torch.zeros(7, 5)
    loss = lens_js(nothing, HiddenTeacher(nothing), head, torch.zeros(0), temperature=1.0, group=None, chunk_tokens=4)
    assert loss.values.shape == (0,)
    assert loss.hidden_gradient.shape == (0, 5)
