"""Attention alignment: hand-written gradient, precision by dtype, extremes, chunks and the memory they bound.

Float64 runs of the same code serve as the truth here; that they are the truth is what ``test_attention.py`` proves
against slow loops.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_oisd.losses import attention
from megatron_oisd.losses.attention import attention_alignment, sample_keys, teacher_log_probs


def _case(length=40, rows=2, heads=4, key_heads=2, dim=16, *, window=6, num_global=5, dtype=torch.float64, seed=0):
    """(query, key) of student and teacher, sample of every position, weights of both signs and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        tuple(
            torch.randn(length, rows, n, dim, generator=generator, dtype=torch.float64).to(dtype)
            for n in (heads, key_heads)
        )
        for _ in range(2)
    ]
    sample = sample_keys(torch.ones(rows, length, dtype=torch.bool), window=window, num_global=num_global)
    weights = torch.linspace(-1.0, 1.0, rows * length)
    weights[weights.abs() < 0.1] = 0.0
    return *pairs, sample, weights


def _run(student, teacher, sample, weights, *, scale=0.25, chunk=16):
    log_probs = teacher_log_probs(*teacher, sample, scale=scale, chunk_queries=chunk)
    loss = attention_alignment(
        *student, log_probs, sample, weights, scale=scale, num_heads_total=student[0].shape[2], chunk_queries=chunk
    )
    return loss.values, loss.query_gradient, loss.key_gradient


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, log_probs, sample, weights):
        loss = attention_alignment(
            query, key, log_probs, sample, weights, scale=0.7, num_heads_total=query.shape[2], chunk_queries=3
        )
        ctx.save_for_backward(loss.query_gradient, loss.key_gradient)
        return (weights * loss.values).sum()

    @staticmethod
    def backward(ctx, upstream):
        return *(upstream * gradient for gradient in ctx.saved_tensors), None, None, None


def test_gradcheck():
    student, teacher, sample, _ = _case(5, 2, 4, 2, 3, window=2, num_global=2)
    log_probs = teacher_log_probs(*teacher, sample, scale=0.7, chunk_queries=3)
    weights = torch.linspace(-1.5, 1.0, 10, dtype=torch.float64)
    leaves = tuple(tensor.requires_grad_() for tensor in student)
    assert torch.autograd.gradcheck(lambda query, key: _Loss.apply(query, key, log_probs, sample, weights), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_chunk_size_does_not_matter(dtype):
    case = _case(dtype=dtype)
    whole = _run(*case, chunk=80)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 1e-3}[dtype]
    for chunk in (1, 7, 79, 1000):
        for part, other in zip(_run(*case, chunk=chunk), whole, strict=True):
            torch.testing.assert_close(part, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def _relative(result, truth):
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("dtype", "value_error", "gradient_error"),
    [(torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 3e-3), (torch.float16, 1e-6, 4e-4)],
)
def test_error_by_dtype(dtype, value_error, gradient_error):
    """Against float64 on the same (rounded) inputs: only the gradient's own rounding to the input's dtype remains.

    Measured relative errors (norm) of values and gradients: fp32 7e-8, 3e-7; bf16 7e-8, 1.7e-3; fp16 7e-8, 2.1e-4.
    """
    case = _case(256, 2, 8, 2, 64, window=32, num_global=32, dtype=dtype)
    exact = [tuple(tensor.double() for tensor in pair) for pair in case[:2]]
    truth = _run(*exact, *case[2:], scale=0.125)
    values, *gradients = _run(*case, scale=0.125)
    assert values.dtype is torch.float32
    assert _relative(values, truth[0]) < value_error
    for gradient, expected in zip(gradients, truth[1:], strict=True):
        assert gradient.dtype is dtype
        assert _relative(gradient, expected) < gradient_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_ten_thousand_stay_finite(dtype):
    """Both softmaxes are then one key each: JS is log 2 where the keys differ and 0 where they agree."""
    query = torch.full((3, 1, 2, 4), 100.0, dtype=dtype)
    key = torch.zeros(3, 1, 2, 4, dtype=dtype)
    key[0], key[1], key[2] = 25.0, 0.0, -25.0
    sample = sample_keys(torch.tensor([[False, False, True]]), window=2, num_global=1)
    for other, expected in ((-key, math.log(2.0)), (key, 0.0)):
        values, *gradients = _run((query, key), (query, other), sample, torch.tensor([-3.0]), scale=1.0)
        torch.testing.assert_close(values.double(), torch.tensor([expected], dtype=torch.float64), rtol=1e-6, atol=1e-7)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_attention_has_no_loss_and_no_gradient(dtype):
    student, teacher, sample, weights = _case(dtype=dtype)
    for pair in ((student, student), ((student[0], torch.ones_like(student[1])), (teacher[0], 0 * teacher[1]))):
        for result in _run(*pair, sample, weights):
            torch.testing.assert_close(result, torch.zeros_like(result), rtol=0.0, atol=1e-7)


def test_a_single_key_has_no_loss_and_no_gradient():
    student, teacher, _, _ = _case(6, 1)
    sample = sample_keys(torch.ones(1, 6, dtype=torch.bool), window=1, num_global=0)
    for result in _run(student, teacher, sample, torch.ones(6)):
        assert not result.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_queries_is_no_loss(dtype):
    student, teacher, _, _ = _case(6, 2, dtype=dtype)
    sample = sample_keys(torch.zeros(2, 6, dtype=torch.bool), window=3, num_global=2)
    values, query_gradient, key_gradient = _run(student, teacher, sample, torch.zeros(0))
    assert values.shape == (0,)
    assert teacher_log_probs(*teacher, sample, scale=1.0, chunk_queries=4).shape == (0, 4, 5)
    for gradient, tensor in ((query_gradient, student[0]), (key_gradient, student[1])):
        assert gradient.shape == tensor.shape
        assert gradient.dtype is dtype
        assert not gradient.any()


def test_weights_scale_the_gradient_with_their_sign_and_zero_is_exact():
    student, teacher, sample, weights = _case()
    values, *gradients = _run(student, teacher, sample, weights)
    negated = _run(student, teacher, sample, -weights)
    assert torch.equal(values, negated[0])
    for gradient, other in zip(gradients, negated[1:], strict=True):
        assert torch.equal(gradient, -other)
    silent = weights == 0
    assert not gradients[0][sample.position[silent], sample.sequence[silent]].any()
    assert not any(gradient.any() for gradient in _run(student, teacher, sample, torch.zeros_like(weights))[1:])


def test_the_result_carries_no_graph_and_the_teacher_is_constant():
    student, teacher, sample, weights = _case(8, 1)
    for tensor in (*student, *teacher):
        tensor.requires_grad_()
    with torch.enable_grad():
        log_probs = teacher_log_probs(*teacher, sample, scale=0.25, chunk_queries=4)
        results = _run(student, teacher, sample, weights)
    assert not log_probs.requires_grad
    assert not any(result.requires_grad for result in results)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(8, 4, dtype=torch.float64))
    assert torch.isneginf(log_probs[~sample.valid.unsqueeze(1).expand_as(log_probs)]).all()


def test_strided_inputs():
    """Query and key are often views into one projection's output; the gradients are of plain layout."""
    student, teacher, sample, weights = _case()
    mixed = torch.cat([student[0], student[1]], dim=2)
    views = tuple(mixed.split([4, 2], dim=2))
    assert not views[1].is_contiguous()
    for part, other in zip(_run(views, teacher, sample, weights), _run(student, teacher, sample, weights), strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize(
    ("query", "key", "teacher", "weights", "chunk", "message"),
    [
        ((5, 1, 4, 8), (5, 1, 2, 6), (5, 4, 3), 5, 2, r"query \[5, 1, 4, 8\] and key \[5, 1, 2, 6\]"),
        ((5, 1, 4, 8), (5, 1, 3, 8), (5, 4, 3), 5, 2, "multiple of ng"),
        ((5, 4, 8), (5, 2, 8), (5, 4, 3), 5, 2, r"expected \[s, b, np, d\]"),
        ((5, 1, 4, 8), (5, 1, 2, 8), (5, 2, 3), 5, 2, r"teacher_log_probs \[5, 2, 3\]"),
        ((5, 1, 4, 8), (5, 1, 2, 8), (5, 4, 3), 4, 2, r"coefficients \[4\]"),
        ((5, 1, 4, 8), (5, 1, 2, 8), (5, 4, 3), 5, 0, "chunk_queries is 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(query, key, teacher, weights, chunk, message):
    sample = sample_keys(torch.ones(1, 5, dtype=torch.bool), window=2, num_global=1)
    with pytest.raises(ValueError, match=message):
        attention_alignment(
            torch.zeros(query), torch.zeros(key), torch.zeros(teacher), sample, torch.zeros(weights),
            scale=1.0, num_heads_total=4, chunk_queries=chunk,
        )  # fmt: skip


class _Storages(TorchDispatchMode):
    """Most bytes alive at once in storages that were made inside; ``inputs`` were not, nor were views of them."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {name: entry for name, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def test_memory_is_bounded_by_the_chunk():
    """Peak of everything made inside, results excluded, is that of one chunk, whatever the number of queries."""
    length, heads, key_heads, dim, keys, chunk = 512, 8, 4, 16, 24, 16
    student, teacher, _, _ = _case(length, 1, heads, key_heads, dim, dtype=torch.float32)
    peaks = {}
    for queries in (chunk, 128, length):
        chosen = torch.zeros(1, length, dtype=torch.bool)
        chosen[0, length - queries :] = True
        sample = sample_keys(chosen, window=16, num_global=keys - 16)
        weights = torch.ones(queries)
        log_probs = teacher_log_probs(*teacher, sample, scale=0.25, chunk_queries=chunk)
        inputs = (*student, *teacher, log_probs, weights, sample.position, sample.sequence, sample.keys, sample.valid)
        with _Storages(*inputs) as seen:
            attention_alignment(
                *student, log_probs, sample, weights, scale=0.25, num_heads_total=heads, chunk_queries=chunk
            )
        results = 4 * (length * (heads + key_heads) * dim + queries)
        peaks[queries] = seen.peak - results
        with _Storages(*inputs) as seen:
            teacher_log_probs(*teacher, sample, scale=0.25, chunk_queries=chunk)
        assert seen.peak - 4 * queries * heads * keys <= peaks[queries]
    gathered, scores = 4 * chunk * keys * key_heads * dim, 4 * chunk * heads * keys
    assert peaks[chunk] <= 4 * gathered + 12 * scores
    assert max(peaks.values()) <= 1.02 * peaks[chunk]


@pytest.mark.parametrize(("heads", "dim", "sizes"), [(2, 8, [2, 2, 2]), (8, 16, [1] * 6), (1, 1, [6])])
def test_without_a_number_a_chunk_holds_what_its_keys_allow(heads, dim, sizes, monkeypatch):
    """24 keys of 2 heads of 8 fp32 numbers are 1536 bytes; large keys (MLA's) are taken one query at a time."""
    monkeypatch.setattr(attention, "_GATHERED_BYTES", {"cpu": 4096})
    student, teacher, _, _ = _case(40, 1, heads, heads, dim, dtype=torch.float32)
    chosen = torch.zeros(1, 40, dtype=torch.bool)
    chosen[0, 34:] = True
    sample = sample_keys(chosen, window=16, num_global=8)
    chunks = attention._chunks(sample, student[1], None)
    assert [len(chunk.position) for _, chunk in chunks] == sizes
    weights = torch.linspace(-1.0, 1.0, 6)
    for ours, expected in zip(
        _run(student, teacher, sample, weights, chunk=None), _run(student, teacher, sample, weights), strict=True
    ):
        torch.testing.assert_close(ours, expected)
