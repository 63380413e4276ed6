"""Sampled-key attention alignment: the key set, the choice of queries, values and gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oisd.losses.attention import attention_js, sample_keys, sample_query_positions, sampled_scores
from megatron_oisd.losses.reference import jensen_shannon, sampled_key_positions


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


def test_values_and_gradients_equal_the_reference():
    generator = torch.Generator().manual_seed(0)
    query, teacher_query = torch.randn(2, 20, 2, 4, 8, generator=generator, dtype=torch.float64)
    key, teacher_key = torch.randn(2, 20, 2, 2, 8, generator=generator, dtype=torch.float64)
    query.requires_grad_()
    key.requires_grad_()
    chosen = torch.zeros(2, 20, dtype=torch.bool)
    chosen[0, 3:18] = chosen[1, 0:2] = True
    sample = sample_keys(chosen, window=4, num_global=3)
    teacher = sampled_scores(teacher_query, teacher_key, sample, scale=0.3).log_softmax(-1)
    values = attention_js(sampled_scores(query, key, sample, scale=0.3), teacher)
    weights = torch.linspace(-1, 1, values.shape[0], dtype=torch.float64).unsqueeze(1)
    gradients = torch.autograd.grad((weights * values).sum(), (query, key))

    rows = []
    for i, t in chosen.nonzero().tolist():
        keys = sampled_key_positions(t, 4, 3)
        rows.append(
            torch.stack(
                [
                    jensen_shannon(
                        key[keys, i, j // 2] @ query[t, i, j] * 0.3,
                        teacher_key[keys, i, j // 2] @ teacher_query[t, i, j] * 0.3,
                    )
                    for j in range(4)
                ]
            )
        )
    expected = torch.stack(rows)
    torch.testing.assert_close(values, expected)
    for gradient, reference in zip(
        gradients, torch.autograd.grad((weights * expected).sum(), (query, key)), strict=True
    ):
        torch.testing.assert_close(gradient, reference)
        assert torch.isfinite(gradient).all()
