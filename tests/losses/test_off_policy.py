"""Importance weights, masking, the mismatch's figures and the aggregations, each against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_oisd.losses.aggregate import AGGREGATIONS, token_weights
from megatron_oisd.losses.grpo import kl_penalty
from megatron_oisd.losses.off_policy import mismatch, rejection_mask, truncated_importance

MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
DIFFERENCE = torch.tensor([[9.0, 0.2, -1.5, 0.9, -9.0], [1.0, 0.4, 9.0, 9.0, 9.0], [9.0, -9.0, 9.0, 9.0, 9.0]])
ROLLOUT = -torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) - 2.0
OLD = ROLLOUT + DIFFERENCE


def rows():
    return [[DIFFERENCE[b, t].item() for t in range(5) if MASK[b, t]] for b in range(3)]


@pytest.mark.parametrize("threshold", [1.1, 2.0, 100.0])
def test_truncated_importance_is_the_formula(threshold):
    token = truncated_importance(OLD, ROLLOUT, MASK, level="token", threshold=threshold)
    sequence = truncated_importance(OLD, ROLLOUT, MASK, level="sequence", threshold=threshold)
    for b, differences in enumerate(rows()):
        expected = [min(math.exp(d), threshold) for d in differences]
        assert token[b][MASK[b]].tolist() == pytest.approx(expected, rel=1e-5)
        whole = min(math.exp(sum(differences)), threshold)
        assert sequence[b][MASK[b]].tolist() == pytest.approx([whole] * len(differences), rel=1e-5)
    for weights in (token, sequence):
        assert (weights[~MASK] == 1).all()
    assert (truncated_importance(OLD, ROLLOUT, MASK, level="none", threshold=threshold) == 1).all()


@pytest.mark.parametrize("threshold", [1.05, 2.0, 100.0])
def test_rejection_keeps_what_is_within_the_threshold_either_way(threshold):
    bound = math.log(threshold)
    token = rejection_mask(OLD, ROLLOUT, MASK, level="token", threshold=threshold)
    geometric = rejection_mask(OLD, ROLLOUT, MASK, level="geometric", threshold=threshold)
    for b, differences in enumerate(rows()):
        assert token[b][MASK[b]].tolist() == [abs(d) <= bound for d in differences]
        mean = sum(differences) / max(len(differences), 1)
        assert geometric[b][MASK[b]].tolist() == [abs(mean) <= bound] * len(differences)
    for kept in (token, geometric):
        assert not kept[~MASK].any()
    assert torch.equal(rejection_mask(OLD, ROLLOUT, MASK, level="none", threshold=threshold), MASK)


def test_mismatch_is_what_it_says():
    found = mismatch(OLD, ROLLOUT, MASK)
    flat = [d for row in rows() for d in row]
    probs = [abs(math.exp(o) - math.exp(r)) for o, r in zip(OLD[MASK].tolist(), ROLLOUT[MASK].tolist(), strict=True)]
    means = [sum(row) / len(row) for row in rows() if row]
    assert found == pytest.approx(
        {
            "log_prob_diff_mean": sum(map(abs, flat)) / 5, "log_prob_diff_max": 1.5,
            "probs_diff_mean": sum(probs) / 5, "probs_diff_max": max(probs),
            "kl": sum(math.exp(d) - 1 - d for d in flat) / 5, "ppl_ratio": math.exp(sum(means) / 2),
        },
        rel=1e-5,
    )  # fmt: skip
    nothing = mismatch(OLD, ROLLOUT, torch.zeros_like(MASK))
    assert nothing.keys() == found.keys()
    assert {name: value for name, value in nothing.items() if value} == {"ppl_ratio": 1.0}


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregations_are_their_formulas(mode):
    losses = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    sums = [losses[b][MASK[b]].sum().item() for b in range(2)]  # the third has no token
    expected = {
        "token-mean": sum(sums) / 5,
        "seq-mean-token-mean": (sums[0] / 3 + sums[1] / 2) / 2,
        "seq-mean-token-sum": sum(sums) / 2,
        "seq-mean-token-sum-norm": sum(sums) / 2 / 40,
    }[mode]
    weights = token_weights(MASK, mode, max_response_tokens=40)
    assert (weights * losses).sum().item() / 5 == pytest.approx(expected, rel=1e-5)
    assert (weights[~MASK] == 0).all()
    assert (token_weights(torch.zeros_like(MASK), mode, max_response_tokens=40) == 0).all()
    if mode == "token-mean":
        assert torch.equal(weights, MASK.float())  # exactly: the default changes no bit


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="loss aggregation 'mean': expected one of token-mean"):
        token_weights(MASK, "mean", max_response_tokens=1)
    with pytest.raises(ValueError, match="KL estimator 'k4': expected one of k1"):
        kl_penalty(OLD, ROLLOUT, "k4")
