"""The policy update: gradients do not depend on how the batch is split, and every variant of the loss is its formula.

Expected values come from a float64 dense model in one process, with the formulas written out again here.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.helpers.layout import Case, hf_model, largest_error, make_batch, reference, run_case
from tests.helpers.ranks import run_ranks

TOLERANCE = 2e-5

SPLITS = [
    Case(micro_batch=4),
    Case(dp=2, micro_batch=2),
    Case(max_tokens=20),
    Case(max_tokens=60, dp=2),
    Case(max_tokens=30, pp=2),
    Case(max_tokens=48, tp=2, sequence_parallel=True),
    Case(max_tokens=60, packed=True),
    Case(max_tokens=34, packed=True, pp=2, dp=2),
    Case(max_tokens=50, packed=True, tp=2, sequence_parallel=True),
    Case(max_tokens=1000, packed=True, tied=False),
]


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_gradients_do_not_depend_on_the_split(case):
    batch = make_batch(8)
    values, expected = reference(case, batch)
    for got, gradients in run_ranks(case.world, run_case, case, batch):
        assert got == pytest.approx(values, rel=2e-5, abs=1e-7)
        error, name = largest_error(gradients, expected)
        assert error < TOLERANCE, name


def dense(case: Case, batch):
    """Loss and gradients of a variant, written out."""
    from megatron_oisd.losses import reference as ref

    model = ref.prepare_model(hf_model(case.tied))
    knobs = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 10.0} | dict(case.policy)
    beta, kind = knobs.get("kl_coefficient", 0.0), knobs.get("kl_estimator", "k3")
    alpha, temperature = knobs.get("entropy_coefficient", 0.0), knobs.get("temperature", 1.0)
    sums, lengths = [], []
    for i in range(len(batch.tokens)):
        log_p = (model(batch.tokens[i : i + 1]).logits[0] / temperature).log_softmax(-1)
        where = batch.mask[i].nonzero().flatten()
        lp = torch.stack([log_p[t, batch.tokens[i, t + 1]] for t in where])
        old = lp.detach() if batch.old_log_probs is None else batch.old_log_probs[i, where].double()
        ratio = (lp - old).exp()
        advantage = batch.advantages[i].double()
        clipped = ratio.clamp(1 - knobs["clip_low"], 1 + knobs["clip_high"])
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        if advantage < 0 and knobs["dual_clip"] is not None:
            loss = torch.minimum(loss, -advantage * knobs["dual_clip"])
        if batch.importance is not None:
            loss = loss * batch.importance[i, where].double()
        if beta:
            d = lp - batch.reference_log_probs[i, where].double()
            loss = loss + beta * {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind]
        entropy = -(log_p[where].exp() * log_p[where]).sum(-1)
        sums.append((loss - alpha * entropy).sum())
        lengths.append(len(where))
    sequences, tokens = len(sums), sum(lengths)
    total = {
        "token-mean": lambda: sum(sums) / tokens,
        "seq-mean-token-mean": lambda: sum(s / n for s, n in zip(sums, lengths, strict=True)) / sequences,
        "seq-mean-token-sum": lambda: sum(sums) / sequences,
        "seq-mean-token-sum-norm": lambda: sum(sums) / sequences / 40,
    }[case.loss_agg_mode]()
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters()}


VARIANTS = [
    Case(oisd=None, policy=(("clip_low", 0.1), ("clip_high", 0.28))),
    Case(oisd=None, policy=(("dual_clip", 1.5),)),
    Case(oisd=None, policy=(("dual_clip", None), ("temperature", 0.7))),
    *(Case(oisd=None, policy=(("kl_coefficient", 0.3), ("kl_estimator", kind))) for kind in ("k1", "k2", "k3")),
    Case(oisd=None, policy=(("entropy_coefficient", 0.2),), tp=2),
    *(
        Case(oisd=None, loss_agg_mode=mode, max_tokens=30, pp=2)
        for mode in ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    ),
    Case(
        oisd=None, loss_agg_mode="seq-mean-token-mean", max_tokens=34, packed=True, dp=2, tp=2,
        policy=(("kl_coefficient", 0.1), ("entropy_coefficient", 0.05), ("clip_high", 0.28)),
    ),
]  # fmt: skip


@pytest.mark.parametrize("importance", [False, True], ids=["", "importance"])
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_every_variant_is_its_formula(case, importance):
    generator = torch.Generator().manual_seed(2)
    batch = make_batch(8)
    batch.reference_log_probs = batch.old_log_probs + 0.3 * torch.randn(batch.mask.shape, generator=generator)
    if importance:
        batch.importance = 2 * torch.rand(batch.mask.shape, generator=generator)
    value, expected = dense(case, batch)
    for got, gradients in run_ranks(case.world, run_case, case, batch):
        assert got["loss"] == pytest.approx(value, rel=2e-5)
        error, name = largest_error(gradients, expected)
        assert error < TOLERANCE, name


@pytest.mark.parametrize(
    "case", [Case(oisd=None, pp=2), Case(oisd=None, max_tokens=34, packed=True, dp=2, tp=2)], ids=str
)
def test_the_policy_that_sampled_needs_no_pass_of_its_own(case):
    batch = dataclasses.replace(make_batch(8), old_log_probs=None)
    value, expected = dense(case, batch)
    for got, gradients in run_ranks(case.world, run_case, case, batch):
        assert got["loss"] == pytest.approx(value, rel=2e-5)
        error, name = largest_error(gradients, expected)
        assert error < TOLERANCE, name


def test_microbatches_cover_every_response_token():
    from megatron_oisd.rl.batch import make_batch as make_rollout_batch
    from megatron_oisd.rl.batch import make_microbatches
    from megatron_oisd.rl.rollout.base import Rollout

    rollouts = [
        Rollout(prompt_ids=[1, 2, 3], response_ids=[7, 8], logprobs=[-0.1, -0.2], finish_reason="stop"),
        Rollout(prompt_ids=[4], response_ids=[9, 6, 5, 2], logprobs=[-1.0, -2.0, -3.0, -4.0], finish_reason="length"),
    ]
    batch = make_rollout_batch(rollouts, torch.tensor([1.0, -1.0]), pad_token_id=0)
    assert batch.tokens.tolist() == [[1, 2, 3, 7, 8], [4, 9, 6, 5, 2]]
    assert batch.mask.tolist() == [[False, False, True, True, False], [True, True, True, True, False]]
    where = {"length_multiple": 4, "device": torch.device("cpu")}
    first, second = make_microbatches(batch, [[0], [1]], variable_length=False, packed=False, **where)
    assert first.tokens.shape == second.tokens.shape == (1, 8)
    (packed,) = make_microbatches(batch, [[1, 0]], variable_length=True, packed=True, **where)
    assert packed.tokens.tolist() == [[4, 9, 6, 5, 2, 1, 2, 3, 7, 8, 0, 0]]
    assert packed.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 10, 12]
    assert packed.position_ids().tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    assert packed.token_advantages().tolist() == [[-1.0] * 5 + [1.0] * 5 + [0.0] * 2]
    responses = [rollouts[0].response_ids, rollouts[1].response_ids]
    for microbatch, expected in ((first, responses[0]), (second, responses[1]), (packed, responses[1] + responses[0])):
        targets = torch.roll(microbatch.tokens, -1, 1)[microbatch.mask]
        assert targets.tolist() == expected
    target = torch.zeros(2, 5)
    batch.unpack(packed, packed.tokens.float(), target)
    assert target.tolist() == batch.tokens.tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [None, 7, 20, 64, 10_000])
def test_a_plan_uses_every_sequence_once_and_keeps_to_the_budget(budget, ranks, packed):
    from megatron_oisd.rl.batch import plan_microbatches

    lengths = [int(x) for x in torch.randint(3, 20, (24,), generator=torch.Generator().manual_seed(1))]
    options = {"data_parallel": ranks, "micro_batch_size": 4, "max_tokens": budget, "packed": packed}
    plan = plan_microbatches(lengths, **options)
    assert sorted(row for rank in plan for rows in rank for row in rows) == list(range(24))
    assert len({len(rank) for rank in plan}) == 1
    assert plan == plan_microbatches(lengths, **options)
    if budget is not None:
        for rows in (rows for rank in plan for rows in rank):
            used = [lengths[row] for row in rows]
            assert len(rows) == 1 or (sum(used) if packed else len(used) * max(used)) <= budget
    with pytest.raises(Exception, match="data-parallel ranks"):
        plan_microbatches(lengths[:1] * 2 if budget else lengths, **options | {"data_parallel": 5})


def test_the_default_is_token_mean_without_extras():
    from megatron_oisd.rl.config import TrainConfig

    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
    assert defaults["loss_agg_mode"] == "token-mean"
    assert defaults["kl_loss_coef"] == defaults["entropy_coeff"] == 0
    assert defaults["rollout_is"] == defaults["rollout_rs"] == "none"
