"""GRPO: token log-probabilities from shards, the clipped loss, group-normalised advantages."""

from __future__ import annotations

import pytest
import torch

from megatron_oisd.losses import reference
from megatron_oisd.losses.advantage import alignment_weight, group_advantages
from megatron_oisd.losses.grpo import policy_loss, vocab_parallel_log_probs
from tests.helpers.ranks import run_ranks


def _inputs():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 16, generator=generator, dtype=torch.float64) * 4
    targets = torch.tensor([0, 3, 4, 8, 10, 9, 1])
    return logits, targets, torch.linspace(-1, 2, 7, dtype=torch.float64)


def _sharded_log_probs():
    import torch.distributed as dist

    from megatron_oisd.runtime import distributed

    distributed.initialize()
    logits, targets, weights = _inputs()
    rank, width = dist.get_rank(), 16 // dist.get_world_size()
    leaf = logits[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    statistics = vocab_parallel_log_probs(
        leaf, targets, group=dist.group.WORLD, temperature=0.9, first_token=rank * width,
        valid_columns=min(max(11 - rank * width, 0), width),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad((weights * statistics.log_probs).sum(), leaf)
    distributed.shutdown()
    return statistics.log_probs.detach(), statistics.entropy, gradient


@pytest.mark.parametrize("world", [1, 2, 4])
def test_log_probs_entropy_and_gradient_from_shards(world):
    logits, targets, weights = _inputs()
    logits.requires_grad_()
    log_p = torch.log_softmax(logits[:, :11] / 0.9, -1)
    expected = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), logits)
    results = run_ranks(world, _sharded_log_probs)
    for log_probs, entropy, _ in results:
        torch.testing.assert_close(log_probs, expected.detach())
        torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(1).detach())
    torch.testing.assert_close(torch.cat([r[2] for r in results], 1), gradient)


def test_policy_loss_and_gradient_equal_the_formula():
    log_ratio = torch.tensor([-1.0, -0.1, 0.0, 0.1, 1.0, 3.0], dtype=torch.float64).repeat(2)
    advantages = torch.tensor([1.5] * 6 + [-0.7] * 6, dtype=torch.float64)
    log_probs = log_ratio.clone().requires_grad_()
    old = torch.zeros_like(log_ratio)
    ours = policy_loss(log_probs, old, advantages, clip_low=0.2, clip_high=0.3, dual_clip=10.0)
    expected = reference.policy_loss(log_probs, old, advantages, 0.2, 0.3, 10.0)
    torch.testing.assert_close(ours.loss, expected)
    (gradient,) = torch.autograd.grad(ours.loss.sum(), log_probs)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), log_probs)
    torch.testing.assert_close(gradient, expected_gradient)
    # A good rollout is not pushed beyond 1 + 0.3, a bad one not below 1 - 0.2; e^3 > 10 meets the dual clip.
    assert gradient[4] == 0
    assert gradient[6] == 0
    assert gradient[11] == 0
    torch.testing.assert_close(ours.kl, -log_ratio)


def test_advantages_are_group_normalised():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    advantages = group_advantages(rewards)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5]) / rewards[0].std()
    torch.testing.assert_close(advantages[0], expected, rtol=1e-5, atol=0)
    assert (advantages[1:] == 0).all()
    assert (group_advantages(torch.ones(3, 1)) == 0).all()
    advantages = torch.tensor([-3.0, 0.2, 3.0])
    assert alignment_weight(advantages, 1.0).tolist() == pytest.approx([-1.0, 0.2, 1.0])
    assert alignment_weight(advantages, 1.0, "absolute").tolist() == pytest.approx([1.0, 0.2, 1.0])
    assert alignment_weight(advantages, 1.0, "none").tolist() == [1.0, 1.0, 1.0]
