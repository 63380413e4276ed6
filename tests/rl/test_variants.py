"""Runs with what is off by default: a reference model, corrections for the engine, token budgets, packing.

The formulas are tests/rl/test_policy.py's and tests/losses/'s; here it is the trainer that must use them.
"""

from __future__ import annotations

import pytest
import torch

from megatron_oisd.rl.reference import ReferenceModel
from tests.helpers.ranks import run_ranks
from tests.helpers.training import read_lines, run_training, training_arguments


def train(workspace, output, world_size=2, **options):
    for code, text in run_ranks(world_size, run_training, training_arguments(workspace, output, **options)):
        assert code == 0, text
    return read_lines(output)


def test_a_reference_model_is_swapped_in_and_out_exactly():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    first = [p.detach().clone() for p in model.parameters()]
    reference = ReferenceModel([model])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    own = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with reference.in_place():
            assert all(map(torch.equal, model.parameters(), first))
        assert all(map(torch.equal, model.parameters(), own))
    with pytest.raises(KeyError), reference.in_place():
        raise KeyError
    assert all(map(torch.equal, model.parameters(), own))


def test_the_kl_is_to_the_model_of_load_also_after_a_resume(workspace, tmp_path):
    options = {"kl_loss_coef": 0.5, "entropy_coeff": 0.01, "save_interval": 2}
    whole = train(workspace, tmp_path / "whole", num_steps=4, **options)
    train(workspace, tmp_path / "parts", num_steps=2, **options)
    assert train(workspace, tmp_path / "parts", num_steps=4, resume=True, **options) == whole
    kl = [line["actor/kl_loss"] for line in whole]
    assert 0 < kl[0] < kl[-1]  # the first mini-batch of all is the reference's own
    for line in whole:
        expected = line["actor/pg_loss"] + 0.5 * line["actor/kl_loss"] - 0.01 * line["actor/entropy"]
        assert line["actor/loss"] == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_an_engine_that_sleeps_during_the_update_changes_nothing(workspace, tmp_path):
    awake, asleep = (
        train(workspace, tmp_path / name, num_steps=2, pp=1, world_size=1, **options)
        for name, options in (("awake", {}), ("asleep", {"rollout_sleep": True}))
    )
    assert asleep == awake


def test_budgets_and_packing_take_the_same_steps(workspace, tmp_path):
    common = {"num_steps": 2, "loss_agg_mode": "seq-mean-token-mean"}
    plain = train(workspace, tmp_path / "plain", **common)
    budget = train(workspace, tmp_path / "budget", max_tokens_per_microbatch=150, **common)
    packed = train(
        workspace, tmp_path / "packed", max_tokens_per_microbatch=150, sequence_packing=True, pp=1, tp=2,
        sequence_parallel=True, **common,
    )  # fmt: skip
    for other in (budget, packed):
        for mine, theirs in zip(plain, other, strict=True):
            assert theirs["critic/rewards/mean"] == mine["critic/rewards/mean"]
            for name in ("actor/loss", "actor/grad_norm", "oisd/think/layer_2", "oisd/attn/layer_2"):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6), name


def test_corrections_for_the_engine_and_filters(workspace, tmp_path):
    """The engine's numerics are the trainer's, so corrections change nothing; what is filtered is not trained on."""
    plain, corrected = (
        train(workspace, tmp_path / name, num_steps=2, **options)
        for name, options in (
            ("plain", {}),
            ("corrected", {"rollout_is": "sequence", "rollout_rs": "geometric", "rollout_rs_threshold": 1.01}),
        )
    )
    for mine, theirs in zip(plain, corrected, strict=True):
        assert theirs["rollout/is_mean"] == pytest.approx(1.0, abs=1e-4)
        assert theirs["rollout/rs_masked_fraction"] == 0
        assert theirs["actor/grad_norm"] == pytest.approx(mine["actor/grad_norm"], rel=1e-3)
        # Without corrections no pass is made for the first mini-batch; its update tells the log-probabilities.
        for name in ("rollout/log_prob_diff_max", "rollout/log_prob_diff_mean"):
            assert theirs[name] == pytest.approx(mine[name], abs=2e-6)
            assert 0 < mine[name] < 1e-4
    # A limit of one token cuts every response that does not end at once: nothing is left to learn from.
    (line,) = train(workspace, tmp_path / "cut", num_steps=1, max_response_tokens=1, overlong_filtering=True)
    kept = 1 - line["response_length/clip_ratio"]
    assert kept < 0.2
    assert (line["actor/grad_norm"] == 0) is (kept == 0)
    (line,) = train(
        workspace, tmp_path / "dr", num_steps=1, loss_agg_mode="seq-mean-token-sum-norm", no_norm_adv_by_std=True
    )
    assert 0 < line["actor/grad_norm"] != plain[0]["actor/grad_norm"]
