"""The chunked logit-lens loss against the float64 reference: value, gradients of hidden states and head, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oisd.losses import js
from megatron_oisd.losses.js import HiddenTeacher, LogitsTeacher, lens_js, linear_js_loss, vocab_parallel_js
from megatron_oisd.losses.js_topk import make_topk_teacher
from megatron_oisd.losses.reference import jensen_shannon
from tests.helpers.ranks import run_ranks


def _tensors(tokens, vocabulary, hidden, *, spread=1.0, seed=0, dtype=torch.float64):
    """Student and teacher hidden states and a head; ``spread`` is the standard deviation of the logits."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, tokens, hidden, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64) * (spread / hidden**0.5)
    return student.to(dtype), teacher.to(dtype), head.to(dtype)


def _reference(student, teacher, head, weights, *, temperature=1.0, columns=None):
    """Loss, hidden gradient and head gradient of dense float64 autograd on the same inputs.

    In half precision the logits are rounded by the product that makes them; what the loss makes of those is compared.
    """
    leaf, head_leaf = student.double().requires_grad_(), head.double().requires_grad_()
    logits, known = leaf @ head_leaf[:columns].t(), teacher.double() @ head.double()[:columns].t()
    if student.dtype in (torch.bfloat16, torch.float16):
        logits = logits + ((student @ head.t())[:, :columns] - logits).detach()
        known = (teacher @ head.t())[:, :columns].double()
    values = jensen_shannon(logits, known, temperature)
    loss = (weights.double() * values).sum()
    return loss.detach(), *torch.autograd.grad(loss, (leaf, head_leaf))


def _ours(student, teacher, head, weights, **options):
    leaf, head_leaf = student.clone().requires_grad_(), head.clone().requires_grad_()
    loss = linear_js_loss(leaf, teacher, head_leaf, weights, **options)
    return loss.detach(), *torch.autograd.grad(loss, (leaf, head_leaf))


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_equals_the_reference(data):
    """No token, one token, chunks that do not divide N, zero and signed weights, logits from equal to +-1e4."""
    draw = data.draw
    tokens, vocabulary, hidden = draw(st.integers(0, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    columns, chunk = draw(st.integers(1, vocabulary)), draw(st.integers(1, 11))
    temperature = draw(st.sampled_from([0.5, 1.0, 2.0]))
    weights = draw(st.lists(st.sampled_from([0.0, -1.5, -1e-3, 0.25, 1.0]), min_size=tokens, max_size=tokens))
    weights = torch.tensor(weights, dtype=torch.float64)
    spread, seed = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])), draw(st.integers(0, 1000))
    student, teacher, head = _tensors(tokens, vocabulary, hidden, spread=spread, seed=seed)
    if draw(st.booleans()):
        teacher = student.clone()
    given_as = HiddenTeacher(teacher) if draw(st.booleans()) else LogitsTeacher(teacher @ head.t())
    found = _ours(student, given_as, head, weights, temperature=temperature, chunk_tokens=chunk, valid_columns=columns)
    expected = _reference(student, teacher, head, weights, temperature=temperature, columns=columns)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)
    assert (found[2][columns:] == 0).all()


@pytest.mark.parametrize("as_hidden", [True, False])
def test_gradcheck(as_hidden):
    student, theirs, head = _tensors(5, 9, 3, spread=2.0)
    weights = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0], dtype=torch.float64)
    logits = theirs @ head.t()

    def loss(hidden, head):
        # A hidden teacher's logits are a constant although they are made with the student's head.
        teacher = HiddenTeacher(theirs) if as_hidden else LogitsTeacher(logits)
        return linear_js_loss(hidden, teacher, head, weights, temperature=0.7, chunk_tokens=2)

    arguments = (student.requires_grad_(), head.requires_grad_())
    if as_hidden:
        assert torch.autograd.gradcheck(lambda hidden: loss(hidden, head.detach()), arguments[:1])
    else:
        assert torch.autograd.gradcheck(loss, arguments)


# Norm over norm. Half precisions: the logits' gradient is rounded, and the hidden gradient once more.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def _error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", _TOLERANCE)
@pytest.mark.parametrize("rows", [js._PRODUCT_ROWS, 64], ids=["at-once", "in-parts"])
def test_precision_of_every_dtype(dtype, rows, monkeypatch):
    """The head's gradient goes to an fp32 buffer that holds something already, as Megatron's does."""
    monkeypatch.setattr(js, "_PRODUCT_ROWS", rows)
    student, theirs, head = _tensors(50, 300, 32, spread=3.0, dtype=dtype)
    theirs = (0.8 * student + 0.6 * theirs).to(dtype)
    weights = torch.linspace(-1.0, 1.5, 50)
    _, hidden_gradient, head_gradient = _reference(student, theirs, head, weights, columns=290)
    buffer = torch.full((300, 32), 0.5)
    loss = lens_js(
        student, HiddenTeacher(theirs), head, weights, temperature=1.0, group=None, chunk_tokens=16, valid_columns=290,
        head_gradient=buffer,
    )  # fmt: skip
    assert loss.hidden_gradient.dtype is dtype
    assert loss.values.dtype is torch.float32
    assert _error(loss.hidden_gradient, hidden_gradient) < _TOLERANCE[dtype]
    assert _error(buffer - 0.5, head_gradient) < _TOLERANCE[dtype]
    assert (buffer[290:] == 0.5).all()


@pytest.mark.parametrize("dtype", _TOLERANCE)
def test_one_hot_distributions(dtype):
    """Logits of +-1e4 on either side: every value is 0 or log 2, and the gradients are 0, not nan."""
    student = torch.eye(4, dtype=dtype)
    head = torch.full((4, 4), -1e4, dtype=dtype).fill_diagonal_(1e4)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0])
    loss, *gradients = _ours(student, HiddenTeacher(student.flip(0)), head, weights, chunk_tokens=3)
    torch.testing.assert_close(loss, torch.tensor(-0.5 * math.log(2.0)), rtol=1e-6, atol=0)
    loss, *same = _ours(student, HiddenTeacher(student), head, weights, chunk_tokens=3)
    assert loss == 0
    for gradient in gradients + same:
        assert (gradient == 0).all()


@pytest.mark.parametrize("kind", ["hidden", "logits", "topk"])
def test_tokens_of_weight_zero_are_not_computed(kind):
    """They may hold anything: 0 times nan would show."""
    student, theirs, head = _tensors(7, 12, 4)
    logits = theirs @ head.t()
    teacher = {
        "hidden": HiddenTeacher(theirs), "logits": LogitsTeacher(logits),
        "topk": make_topk_teacher(logits, 5, temperature=1.0),
    }[kind]  # fmt: skip
    weights = torch.tensor([0.0, 1.0, 0.0, -2.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    expected = _ours(student, teacher, head, weights)
    student[weights == 0] = torch.nan
    found = _ours(student, teacher, head, weights, chunk_tokens=2)
    torch.testing.assert_close(found, expected)
    assert (found[1][weights == 0] == 0).all()


def test_all_weights_zero():
    student, theirs, head = _tensors(3, 8, 4)
    for part in _ours(student, HiddenTeacher(theirs), head, torch.zeros(3)):
        assert (part == 0).all()


def test_the_arriving_gradient_multiplies_both():
    student, theirs, head = _tensors(6, 10, 4)
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    _, *once = _ours(student, HiddenTeacher(theirs), head, weights)
    leaf, head_leaf = student.requires_grad_(), head.requires_grad_()
    loss = linear_js_loss(leaf, HiddenTeacher(theirs), head_leaf, weights)
    for factor in (-3.0, 0.5):  # twice: nothing that was saved is written over
        found = torch.autograd.grad(factor * loss, (leaf, head_leaf), retain_graph=True)
        torch.testing.assert_close(found, tuple(factor * part for part in once))


def test_parameters_may_be_given_as_they_are():
    """The pipeline's loss makes gradients itself: nothing is recorded, whatever its arguments require."""
    student, theirs, head = _tensors(3, 8, 4)
    arguments = {"temperature": 1.0, "group": None, "chunk_tokens": 2}
    loss = lens_js(student.requires_grad_(), HiddenTeacher(theirs), head.requires_grad_(), torch.ones(3), **arguments)
    assert not loss.values.requires_grad
    assert not loss.hidden_gradient.requires_grad


def test_a_second_derivative_is_refused():
    """The gradients are made in forward, so that their own derivative would silently be missing."""
    student, theirs, head = _tensors(3, 8, 4)
    leaf = student.requires_grad_()
    losses = [
        linear_js_loss(leaf, HiddenTeacher(theirs), head, torch.ones(3, dtype=torch.float64)),
        vocab_parallel_js(leaf @ head.t(), theirs @ head.t()).sum(),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_a_device_that_adds_unrounded_products(monkeypatch):
    """PyTorch's fp32 = fp32 + bf16 x bf16, which CUDA has, stands in for the CPU too: the same call, less rounding."""
    library = torch.library.Library("aten", "IMPL")

    def addmm(total, left, right, out_dtype, beta=1, alpha=1, *, out):
        assert out.data_ptr() == total.data_ptr()
        assert (out_dtype, alpha) == (torch.float32, 1)
        assert left.dtype is right.dtype is torch.bfloat16
        product = (left.double() @ right.double()).float()
        return out.copy_(product if beta == 0 else out + product)

    student, theirs, head = _tensors(40, 60, 16, spread=2.0, dtype=torch.bfloat16)
    weights = torch.linspace(-1, 1, 40)

    def run():
        buffer = torch.zeros(60, 16)
        lens_js(
            student, HiddenTeacher(theirs), head, weights, temperature=1.0, group=None, chunk_tokens=2,
            head_gradient=buffer,
        )  # fmt: skip
        return buffer

    *_, expected = _reference(student, theirs, head, weights)
    rounded = _error(run(), expected)
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(js, "_products_stay_wide", lambda *_: True)
    assert _error(run(), expected) < rounded


def test_the_cpu_is_not_asked_for_unrounded_products():
    assert not js._products_stay_wide(torch.device("cpu"), torch.float32, torch.bfloat16)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_products_are_added_unrounded(dtype):
    device = torch.device("cuda")
    student, theirs, head = (part.to(device) for part in _tensors(300, 5000, 64, spread=3.0, dtype=dtype))
    weights = torch.linspace(-1.0, 1.5, 300, device=device)
    _, hidden_gradient, head_gradient = _reference(student, theirs, head, weights, columns=4999)
    buffer = torch.full((5000, 64), 0.5, device=device)
    loss = lens_js(
        student, HiddenTeacher(theirs), head, weights, temperature=1.0, group=None, chunk_tokens=128,
        valid_columns=4999, head_gradient=buffer,
    )  # fmt: skip
    assert js._products_stay_wide(device, torch.float32, dtype)
    assert _error(loss.hidden_gradient, hidden_gradient) < _TOLERANCE[dtype]
    assert _error(buffer - 0.5, head_gradient) < _TOLERANCE[dtype]


# --------------------------------------------------------------------------------------------------------- from shards


def _sharded(dtype, columns):
    import torch.distributed as dist

    from megatron_oisd.runtime import distributed

    distributed.initialize(tensor_parallel=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    student, theirs, head = _tensors(9, 64, 8, spread=2.0, dtype=dtype)
    width = 64 // world
    own = head[rank * width : (rank + 1) * width]
    weights = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 2.0, -0.25, 0.0, 1.0])
    found = _ours(
        student, HiddenTeacher(theirs), own, weights, group=dist.group.WORLD, chunk_tokens=4,
        valid_columns=min(max(columns - rank * width, 0), width),
    )  # fmt: skip
    distributed.shutdown()
    return found


@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (4, torch.bfloat16)])
def test_shards_give_the_whole_vocabularys_loss_and_gradients(world, dtype):
    """45 of 64 columns are vocabulary: over four ranks one shard is cut and one is empty."""
    results = run_ranks(world, _sharded, dtype, 45)
    student, theirs, head = _tensors(9, 64, 8, spread=2.0, dtype=dtype)
    weights = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 2.0, -0.25, 0.0, 1.0])
    loss, hidden_gradient, head_gradient = _reference(student, theirs, head, weights, columns=45)
    tolerance = 2 * _TOLERANCE[dtype]
    for found, gradient, _ in results:
        assert torch.equal(found, results[0][0])
        assert torch.equal(gradient, results[0][1])
        torch.testing.assert_close(found.double(), loss, rtol=tolerance, atol=tolerance)
        assert _error(gradient, hidden_gradient) < tolerance
    assert _error(torch.cat([result[2] for result in results]), head_gradient) < tolerance


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 0}, r"chunk_tokens is 0: expected at least 1"),
        ({"chunk_tokens": -4}, r"chunk_tokens is -4"),
        ({"temperature": 0.0}, r"temperature is 0.0: expected a positive number"),
        ({"temperature": math.nan}, r"temperature is nan"),
        ({"valid_columns": 11}, r"valid_columns is 11: expected 0 to 10"),
        ({"valid_columns": -1}, r"valid_columns is -1"),
        ({"weights": torch.ones(5)}, r"coefficients: shape \[5\], expected \[6\]"),
        ({"weights": torch.tensor([0.0])}, r"coefficients: shape \[1\], expected \[6\]"),
        ({"teacher": HiddenTeacher(torch.zeros(7, 4))}, r"teacher's hidden states: shape \[7, 4\], expected \[6, 4\]"),
        ({"teacher": LogitsTeacher(torch.zeros(6, 9))}, r"teacher's logits: shape \[6, 9\], expected \[6, 10\]"),
        (
            {"teacher": make_topk_teacher(torch.zeros(4, 10), 3, temperature=1.0)},
            r"teacher's token ids: shape \[4\], expected \[6\]",
        ),
        ({"head": torch.zeros(10, 3)}, r"head: shape \[10, 3\], expected \[10, 4\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change, message):
    arguments = {
        "student_hidden": torch.zeros(6, 4), "teacher": HiddenTeacher(torch.zeros(6, 4)), "head": torch.zeros(10, 4),
        "weights": torch.ones(6),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_js_loss(**(arguments | change))


def test_a_head_gradient_of_another_shape_is_named():
    nothing = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"head_gradient: shape \[9, 4\], expected \[10, 4\]"):
        lens_js(
            nothing, HiddenTeacher(nothing), torch.zeros(10, 4), torch.ones(2), temperature=1.0, group=None,
            chunk_tokens=4, head_gradient=torch.zeros(9, 4),
        )  # fmt: skip
