"""Sampled-key attention alignment: the key set, the choice of queries, values and gradients against slow loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oisd.losses.attention import (
    attention_alignment,
    common_sliding_window,
    sample_keys,
    sample_query_positions,
    teacher_log_probs,
)
from megatron_oisd.losses.reference import jensen_shannon, sampled_key_positions
from megatron_oisd.runtime import cpu

SCALE = 0.3


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _listed(position, start, window, num_global, left):
    """Keys of a query, listed: the reference's, counted from the first key that the query may see."""
    first = start if left is None else max(start, position - left)
    return [first + key for key in sampled_key_positions(position - first, window, num_global)]


def _fast(student, teacher, sample, coefficients, *, chunk=3, heads=None):
    """Values and gradients of the two (query, key) pairs by the code under test."""
    log_probs = teacher_log_probs(*teacher, sample, scale=SCALE, chunk_queries=chunk)
    loss = attention_alignment(
        *student, log_probs, sample, coefficients, scale=SCALE, num_heads_total=heads or student[0].shape[2],
        chunk_queries=chunk,
    )  # fmt: skip
    return loss.values, loss.query_gradient, loss.key_gradient


def _slow(student, teacher, queries, coefficients):
    """The same by loops over queries and heads and plain autograd; ``queries`` lists (position, sequence, keys)."""
    query, key = (tensor.clone().requires_grad_() for tensor in student)
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    values = [
        torch.stack(
            [
                jensen_shannon(
                    key[keys, i, j // group] @ query[t, i, j] * SCALE,
                    teacher[1][keys, i, j // group] @ teacher[0][t, i, j] * SCALE,
                )
                for j in range(heads)
            ]
        ).mean()
        for t, i, keys in queries
    ]
    total = torch.stack(values) if values else query.new_zeros(0)
    loss = (coefficients * total).sum() + 0.0 * (query.sum() + key.sum())
    return total.detach(), *torch.autograd.grad(loss, (query, key))


def _assert_equal(result, expected, atol=1e-13):
    for part, other in zip(result, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=atol)


# ------------------------------------------------------------------------------------------------------------ the keys


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 60), window=st.integers(1, 12), num_global=st.integers(0, 9))
def test_key_set_equals_the_listed_one(length, window, num_global):
    sample = sample_keys(torch.ones(1, length, dtype=torch.bool), window=window, num_global=num_global)
    for row in range(length):
        keys = sample.keys[row][sample.valid[row]].tolist()
        assert sorted(keys) == sorted(sampled_key_positions(row, window, num_global))
        assert len(set(keys)) == len(keys)
        assert max(keys) <= row
        assert row in keys
        assert num_global == 0 or 0 in keys


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=5), window=st.integers(1, 9),
    num_global=st.integers(0, 7), left=st.one_of(st.none(), st.integers(0, 30)), tail=st.integers(0, 3),
)  # fmt: skip
def test_packed_and_sliding_key_sets_equal_the_listed_ones(lengths, window, num_global, left, tail):
    """Including sequences of no tokens (Megatron repeats the last border) and padding behind the last one."""
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    chosen = torch.zeros(1, borders[-1] + tail, dtype=torch.bool)
    chosen[:, : borders[-1]] = True
    sample = sample_keys(
        chosen, window=window, num_global=num_global, cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        sliding_window=None if left is None else (left, 0),
    )  # fmt: skip
    assert sample.position.tolist() == list(range(borders[-1]))
    row = 0
    for start, stop in pairwise(borders):
        for position in range(start, stop):
            keys = sample.keys[row][sample.valid[row]].tolist()
            assert sorted(keys) == sorted(_listed(position, start, window, num_global, left))
            assert (sample.keys[row][~sample.valid[row]] == position).all()
            row += 1


@pytest.mark.parametrize("window_size", [(0, 0), (3, 0), (7, 2), (100, 0)])
def test_sliding_window_is_megatrons(window_size):
    """With room for every key, the sampled keys are the ones that Megatron-Core's own mask leaves a causal query."""
    from megatron.core.transformer.utils import get_sliding_window_causal_mask

    installed = not cpu.is_installed() and cpu.install()
    try:
        hidden = get_sliding_window_causal_mask(20, 20, window_size).cpu()
    finally:
        if installed:
            cpu.uninstall()
    visible = ~hidden & torch.ones(20, 20, dtype=torch.bool).tril()
    sample = sample_keys(torch.ones(1, 20, dtype=torch.bool), window=5, num_global=20, sliding_window=window_size)
    for position in range(20):
        keys = sample.keys[position][sample.valid[position]]
        assert sorted(keys.tolist()) == visible[position].nonzero().flatten().tolist()


def test_minus_one_is_no_window():
    chosen = torch.ones(1, 30, dtype=torch.bool)
    plain = sample_keys(chosen, window=4, num_global=3)
    unlimited = sample_keys(chosen, window=4, num_global=3, sliding_window=(-1, -1))
    assert torch.equal(plain.keys, unlimited.keys)
    assert torch.equal(plain.valid, unlimited.valid)


def test_layers_with_different_windows_are_compared_on_the_keys_of_both():
    assert common_sliding_window(None, None) is None
    assert common_sliding_window(None, (-1, 0)) is None
    assert common_sliding_window((12, 0), None) == (12, 0)
    assert common_sliding_window((12, 0), (-1, -1), (5, 3)) == (5, 0)
    with pytest.raises(ValueError, match=r"\(-2, 0\)"):
        sample_keys(torch.ones(1, 3, dtype=torch.bool), window=1, num_global=0, sliding_window=(-2, 0))


def test_left_padded_rows_are_the_same_rows_moved():
    starts = [0, 7, 3]
    chosen = torch.zeros(3, 30, dtype=torch.bool)
    for row, start in enumerate(starts):
        chosen[row, start:] = True
    sample = sample_keys(chosen, window=4, num_global=5, starts=torch.tensor(starts), sliding_window=(20, 0))
    for row, start in enumerate(starts):
        alone = sample_keys(torch.ones(1, 30 - start, dtype=torch.bool), window=4, num_global=5, sliding_window=(20, 0))
        mine = sample.sequence == row
        assert torch.equal(sample.keys[mine], alone.keys + start)
        assert torch.equal(sample.valid[mine], alone.valid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": torch.tensor([0]), "cu_seqlens": torch.tensor([0, 6])}, "both given"),
        ({"starts": torch.tensor([0, 0])}, r"shape \[2\]: expected \[1\]"),
        ({"starts": torch.tensor([5])}, r"starts is \[5\]"),
        ({"starts": torch.tensor([-1])}, r"starts is \[-1\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "position 5 is chosen but cu_seqlens ends at 4"),
        ({"cu_seqlens": torch.tensor([1, 6])}, "expected borders that rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 2])}, "expected borders that rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "at most 6"),
    ],
)
def test_malformed_sequences_are_refused(options, message):
    chosen = torch.tensor([[False, False, False, True, False, True]])
    with pytest.raises(ValueError, match=message):
        sample_keys(chosen, window=2, num_global=1, **options)


def test_packed_sequences_stand_in_one_row():
    with pytest.raises(ValueError, match="2 rows"):
        sample_keys(torch.ones(2, 3, dtype=torch.bool), window=1, num_global=0, cu_seqlens=torch.tensor([0, 3]))


# --------------------------------------------------------------------------------------------------------- the queries


def test_query_choice_depends_on_the_sequence_alone():
    mask = torch.zeros(3, 40, dtype=torch.bool)
    mask[0, 5:35] = mask[1, 2:4] = mask[2, 5:35] = True
    chosen = sample_query_positions(mask, num_queries=8, seed=1, step=2, sequence_ids=[11, 12, 13])
    assert chosen.sum(1).tolist() == [8, 2, 8]
    assert (chosen & ~mask).sum() == 0
    assert not torch.equal(chosen[0], chosen[2])
    alone = sample_query_positions(mask[2:], num_queries=8, seed=1, step=2, sequence_ids=[13])
    assert torch.equal(alone[0], chosen[2])
    other_step = sample_query_positions(mask[2:], num_queries=8, seed=1, step=3, sequence_ids=[13])
    assert not torch.equal(other_step[0], chosen[2])


def test_query_choice_does_not_depend_on_the_packing():
    """The cap holds for each packed sequence; trailing empty sequences and padding need no name."""
    lengths, ids, mask = [12, 30, 3, 20], [5, 6, 7, 8], torch.zeros(1, 70, dtype=torch.bool)
    borders = torch.tensor([0, 12, 42, 45, 65, 65, 70])
    alone = []
    for length, start, identity in zip(lengths, borders.tolist(), ids, strict=False):
        mask[0, start + 1 : start + length] = True
        own = torch.ones(1, length, dtype=torch.bool)
        own[0, 0] = False
        alone.append(sample_query_positions(own, num_queries=6, seed=3, step=4, sequence_ids=[identity])[0])
    before = mask.clone()
    chosen = sample_query_positions(mask, num_queries=6, seed=3, step=4, sequence_ids=ids, cu_seqlens=borders)
    assert torch.equal(chosen[0, :65], torch.cat(alone))
    assert not chosen[0, 65:].any()
    assert [int(part.sum()) for part in alone] == [6, 6, 2, 6]
    assert torch.equal(mask, before)


def test_every_sequence_with_a_mask_needs_a_name():
    mask = torch.ones(1, 9, dtype=torch.bool)
    options = {"num_queries": 2, "seed": 0, "step": 0}
    with pytest.raises(ValueError, match="behind the last of the 1 sequences"):
        sample_query_positions(mask, sequence_ids=[1], cu_seqlens=torch.tensor([0, 4, 9]), **options)
    with pytest.raises(ValueError, match="behind the last of the 2 sequences"):
        sample_query_positions(mask, sequence_ids=[1, 2], cu_seqlens=torch.tensor([0, 4, 7]), **options)
    with pytest.raises(ValueError, match="3 sequence_ids for 2 sequences"):
        sample_query_positions(mask, sequence_ids=[1, 2, 3], cu_seqlens=torch.tensor([0, 4, 9]), **options)
    with pytest.raises(ValueError, match="2 sequence_ids for 1 sequences"):
        sample_query_positions(mask, sequence_ids=[1, 2], **options)


# -------------------------------------------------------------------------------------------------- values, gradients


def test_values_and_gradients_equal_the_reference():
    student, teacher = [(_randn(20, 2, 4, 8, seed=n), _randn(20, 2, 2, 8, seed=n + 1)) for n in (0, 2)]
    chosen = torch.zeros(2, 20, dtype=torch.bool)
    chosen[0, 3:18] = chosen[1, 0:2] = True
    sample = sample_keys(chosen, window=4, num_global=3)
    weights = torch.linspace(-1, 1, 17, dtype=torch.float64)
    queries = [(t, i, sampled_key_positions(t, 4, 3)) for i, t in chosen.nonzero().tolist()]
    _assert_equal(_fast(student, teacher, sample, weights), _slow(student, teacher, queries, weights))


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 14), rows=st.integers(1, 3), key_heads=st.integers(1, 3), group=st.integers(1, 3),
    dim=st.integers(1, 7), window=st.integers(1, 5), num_global=st.integers(0, 4),
    left=st.one_of(st.none(), st.integers(0, 8)), magnitude=st.sampled_from([0.0, 1e-3, 1.0, 6.0, 1e4]),
    chunk=st.integers(1, 50), share=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_every_shape_equals_the_reference(
    length, rows, key_heads, group, dim, window, num_global, left, magnitude, chunk, share, seed
):
    heads = key_heads * group
    student, teacher = [
        (_randn(length, rows, heads, dim, seed=n) * magnitude, _randn(length, rows, key_heads, dim, seed=n + 1))
        for n in (seed, seed + 2)
    ]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, length, (rows,), generator=generator)
    chosen = (torch.rand(rows, length, generator=generator) < share) & (torch.arange(length) >= starts.unsqueeze(1))
    weights = torch.randn(int(chosen.sum()), generator=generator, dtype=torch.float64)
    sample = sample_keys(
        chosen, window=window, num_global=num_global, starts=starts, sliding_window=None if left is None else (left, 0)
    )
    queries = [(t, i, _listed(t, int(starts[i]), window, num_global, left)) for i, t in chosen.nonzero().tolist()]
    # Float64 rounding of a score enters its softmax absolutely, and the key's gradient is as large as the query.
    atol = max(1e-13, 1e-15 * magnitude**2)
    _assert_equal(
        _fast(student, teacher, sample, weights, chunk=chunk), _slow(student, teacher, queries, weights), atol
    )


def test_multi_latent_attention_shapes():
    """As many key heads as query heads, 128 + 64 dimensions, of which values and kv_channels know nothing."""
    student, teacher = [(_randn(9, 1, 4, 192, seed=n) / 4, _randn(9, 1, 4, 192, seed=n + 1) / 4) for n in (0, 2)]
    chosen = torch.arange(9).unsqueeze(0) >= 4
    weights = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.2], dtype=torch.float64)
    sample = sample_keys(chosen, window=3, num_global=2)
    queries = [(t, 0, sampled_key_positions(t, 3, 2)) for t in range(4, 9)]
    _assert_equal(_fast(student, teacher, sample, weights), _slow(student, teacher, queries, weights))


def test_packed_sequences_equal_separate_ones_and_never_meet():
    """To rounding (a vectorised exp may round by place); what stands elsewhere, NaN included, is not even read."""
    lengths = [11, 1, 17]
    borders = [0, 11, 12, 29]
    student, teacher = [(_randn(31, 1, 4, 8, seed=n), _randn(31, 1, 2, 8, seed=n + 1)) for n in (0, 2)]
    chosen = torch.zeros(1, 31, dtype=torch.bool)
    chosen[0, :29] = True
    weights = _randn(29, seed=9)
    options = {"window": 3, "num_global": 4, "sliding_window": (12, 0)}
    sample = sample_keys(chosen, cu_seqlens=torch.tensor([*borders, 31]), **options)
    packed = _fast(student, teacher, sample, weights, chunk=5)
    for length, start in zip(lengths, borders, strict=False):
        own = slice(start, start + length)
        alone = sample_keys(torch.ones(1, length, dtype=torch.bool), **options)
        cut = [(query[own], key[own]) for query, key in (student, teacher)]
        _assert_equal(_fast(*cut, alone, weights[own], chunk=5), [whole[own] for whole in packed])

        spoiled = [(query.clone(), key.clone()) for query, key in (student, teacher)]
        for tensor in (*spoiled[0], *spoiled[1]):
            tensor[:start] = tensor[start + length :] = torch.nan
        only = torch.zeros_like(chosen)
        only[0, own] = True
        sample = sample_keys(only, cu_seqlens=torch.tensor(borders), **options)
        values, *gradients = _fast(*spoiled, sample, weights[own], chunk=5)
        _assert_equal(
            [values, *(part[own] for part in gradients)], [packed[0][own], *(part[own] for part in packed[1:])]
        )
        for gradient in gradients:
            assert not gradient[:start].any()
            assert not gradient[start + length :].any()


def test_rows_of_a_microbatch_equal_microbatches_of_one_row():
    """The same sequences in another batch split: same queries and keys, values and gradients equal to rounding."""
    student, teacher = [(_randn(20, 3, 4, 8, seed=n), _randn(20, 3, 2, 8, seed=n + 1)) for n in (0, 2)]
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 12:] = False

    def run(rows):
        chosen = sample_query_positions(mask[rows], num_queries=7, seed=1, step=5, sequence_ids=list(range(3))[rows])
        cut = [(query[:, rows], key[:, rows]) for query, key in (student, teacher)]
        sample = sample_keys(chosen, window=3, num_global=4)
        return _fast(*cut, sample, torch.ones(len(sample.position), dtype=torch.float64), chunk=4)

    whole, parts = run(slice(0, 3)), [run(slice(n, n + 1)) for n in range(3)]
    _assert_equal([torch.cat([part[n] for part in parts], dim=min(n, 1)) for n in range(3)], whole)


def test_shares_of_the_head_shards_add_up():
    """Tensor parallelism: query heads and their key heads split over ranks, each given the count of all heads."""
    student, teacher = [(_randn(12, 1, 6, 8, seed=n), _randn(12, 1, 3, 8, seed=n + 1)) for n in (0, 2)]
    sample = sample_keys(torch.ones(1, 12, dtype=torch.bool), window=3, num_global=2)
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64)
    shards = []
    for rank in range(3):
        cut = [(q[:, :, 2 * rank : 2 * rank + 2], k[:, :, rank : rank + 1]) for q, k in (student, teacher)]
        shards.append(_fast(*cut, sample, weights, heads=6))
    values, *gradients = zip(*shards, strict=True)
    whole = _fast(student, teacher, sample, weights)
    _assert_equal([sum(values), *(torch.cat(parts, dim=2) for parts in gradients)], whole)
