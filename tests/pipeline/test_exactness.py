"""Loss and every parameter gradient of GRPO + OISD, on every layout, against a single-process float64 reference.

Why: a right loss with a wrong gradient is the commonest silent bug of losses that cross parallel ranks. What runs is
the trainer's own path: Megatron's schedules, DistributedDataParallel, finalize_model_grads, over gloo. The reference
(``losses/reference.py``) is an HF model with plain autograd and shares no code with it.

What it does not prove: NCCL, Transformer Engine, CUDA streams, bf16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_oisd.config import OISDConfig
from tests.helpers.layout import Case, largest_error, make_batch, reference, run_case
from tests.helpers.ranks import run_ranks

# fp32 against float64: sums of a few hundred terms in another order.
TOLERANCE = 2e-5

OISD = OISDConfig(layers=(2,), attn_window=3, attn_global_keys=3)
SEVERAL = replace(OISD, layers=(1, 2, 3))
NO_HEAD = replace(OISD, head_gradient=False)
FULL_RECOMPUTE = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 2))
BLOCK_RECOMPUTE = (("recompute_granularity", "full"), ("recompute_method", "block"), ("recompute_num_layers", 1))

CASES = [
    Case(oisd=None),
    Case(),
    Case(tied=False),
    Case(oisd=NO_HEAD),
    Case(tied=False, oisd=NO_HEAD),
    Case(micro_batch=4, oisd=replace(SEVERAL, temperature=1.7, advantage_clip=0.5)),
    Case(micro_batch=2, oisd=replace(OISD, aggregation="token", attn_queries=4)),
    Case(tp=2),
    Case(tp=2, tied=False),
    Case(tp=2, oisd=NO_HEAD),
    Case(tp=2, sequence_parallel=True, oisd=SEVERAL, micro_batch=2),
    Case(pp=2),
    Case(pp=2, tied=False),
    Case(pp=2, oisd=NO_HEAD),
    Case(pp=2, oisd=replace(OISD, advantage_weighting="absolute")),
    Case(pp=2, micro_batch=2, oisd=replace(OISD, advantage_weighting="none")),
    Case(pp=2, tied=False, oisd=NO_HEAD),
    Case(pp=2, oisd=replace(SEVERAL, attn_queries=4, aggregation="token"), micro_batch=2),
    Case(pp=2, oisd=replace(OISD, layers=(3,)), tied=False),
    Case(pp=2, oisd=replace(OISD, lambda_attn=0.0, chunk_tokens=5)),
    Case(pp=2, oisd=replace(OISD, lambda_think=0.0)),
    Case(pp=4),
    Case(pp=4, tied=False, oisd=SEVERAL),
    Case(pp=4, oisd=replace(NO_HEAD, layers=(3,))),
    Case(tp=2, pp=2),
    Case(tp=2, pp=2, tied=False, sequence_parallel=True),
    Case(tp=2, pp=2, oisd=NO_HEAD),
    Case(dp=2),
    Case(dp=2, pp=2, tied=False),
    Case(dp=2, tp=2, oisd=SEVERAL),
    Case(dp=2, pp=2, per_token_loss=False),
    Case(dp=2, pp=2, per_token_loss=False, oisd=replace(OISD, aggregation="token")),
    Case(dp=2, pp=2, per_token_loss=False, counts=False),
    Case(dp=2, pp=2, per_token_loss=False, counts=False, oisd=replace(OISD, aggregation="token")),
    Case(dp=2, pp=2, micro_batch=2, counts=False, oisd=replace(OISD, aggregation="token")),
    Case(dp=2, pp=2, distributed_optimizer=True),
    Case(pp=2, overrides=FULL_RECOMPUTE, oisd=replace(OISD, layers=(1,))),
    Case(pp=2, overrides=BLOCK_RECOMPUTE, oisd=SEVERAL),
    Case(pp=2, overrides=(("recompute_granularity", "selective"),), oisd=SEVERAL),
    Case(pp=2, vpp=2, oisd=SEVERAL),
    Case(tp=2, pp=2, vpp=2, tied=False, sequence_parallel=True, oisd=SEVERAL),
    Case(pp=2, vpp=2, oisd=SEVERAL, overrides=(*FULL_RECOMPUTE[:2], ("recompute_num_layers", 1))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_the_reference(case):
    batch = make_batch()
    expected_values, expected = reference(case, batch)
    for values, gradients in run_ranks(case.world, run_case, case, batch):
        assert values == pytest.approx(expected_values, rel=TOLERANCE, abs=1e-7)
        error, name = largest_error(gradients, expected)
        assert error < TOLERANCE, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("case", [Case(pp=2), Case(tp=2, tied=False)], ids=str)
def test_float64_leaves_nothing_but_the_fp32_rotary_tables(case):
    """In float64 the same path comes 100 times closer, so what fp32 leaves is rounding and not a small bug."""
    batch = make_batch()
    case = replace(case, dtype=torch.float64)
    _, expected = reference(case, batch)
    for _, gradients in run_ranks(case.world, run_case, case, batch):
        assert largest_error(gradients, expected)[0] < 2e-7


@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"tp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_lambda_zero_is_bit_identical_to_grpo(layout):
    batch = make_batch()
    plain = Case(**layout, oisd=None)
    off = Case(**layout, oisd=replace(OISD, lambda_think=0.0, lambda_attn=0.0))
    results = run_ranks(plain.world, run_case, plain, batch)
    for (values, gradients), (off_values, off_gradients) in zip(
        results, run_ranks(off.world, run_case, off, batch), strict=True
    ):
        assert off_values == values
        for name, gradient in gradients.items():
            assert torch.equal(off_gradients[name], gradient), name


def test_the_comparison_can_fail():
    """OISD changes the gradients by far more than the tolerance, so agreement means something."""
    batch = make_batch()
    _, with_oisd = reference(Case(), batch)
    _, without = reference(Case(oisd=None), batch)
    assert largest_error(without, with_oisd)[0] > 100 * TOLERANCE


def test_one_degenerate_batch_gives_no_gradient():
    """All advantages equal zero: no tokens are computed or sent, and nothing hangs."""
    batch = make_batch()
    batch.advantages = torch.zeros_like(batch.advantages)
    for values, gradients in run_ranks(2, run_case, Case(pp=2), batch):
        assert all(value == 0 for value in values.values())
        assert all((gradient == 0).all() for gradient in gradients.values())
