"""Fifty optimizer steps on several layouts against a golden trajectory of one float64 process.

Why: a gradient that is right in the first step says nothing about what lives from step to step: the lens replicas, the
buckets that are held back, the optimizer's shards. The golden file is made by ``python -m tests.trajectory --write``
from dense losses and torch's AdamW; change it only with a reason in the commit. Half precision runs under Megatron's
own mixed-precision optimizer and loss scaler and follows less closely.
"""

from __future__ import annotations

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.releases import skip_before
from tests.trajectory import HALF, LAYOUTS, STEPS, dense, deviation, golden, on_layout

# fp32 against float64 after 50 steps; the largest seen is 1e-5. Residuals of rounding cancel: seen 2.3e-7.
TOLERANCE, RESIDUAL = 5e-5, 2e-6
OVERLAPPED = next(layout for layout in LAYOUTS if "overlapped" in layout.name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_fifty_steps_follow_the_golden_trajectory(layout):
    skip_before(layout.name)
    expected = golden()
    for found in run_ranks(layout.world, on_layout, layout):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert len(values) == len(found[name]) == STEPS
            largest, mean = deviation(found[name], values)
            assert largest < TOLERANCE, name
            assert abs(mean) < RESIDUAL, f"{name} drifts"


@pytest.mark.parametrize(("layout", "tolerance"), zip(HALF, [0.08, 0.03], strict=True), ids=["bf16", "fp16"])
def test_half_precision_follows_for_twenty_steps(layout, tolerance):
    """fp32 gradients and main weights; fp16 under Megatron's gradient scaler, whose factor the lens must carry too."""
    expected = golden()
    for found in run_ranks(layout.world, on_layout, layout, 20):
        for name, values in expected.items():
            largest, mean = deviation(found[name], values[:20])
            assert largest < tolerance, name
            assert abs(mean) < 0.01, f"{name} drifts"


@pytest.mark.parametrize(
    ("layout", "sabotage"),
    [(LAYOUTS[1], "refresh"), (OVERLAPPED, "gather"), (OVERLAPPED, "hold")],
    ids=["replicas never refreshed", "refreshed before parameters are gathered", "reduced before the lens gradient"],
)
def test_what_is_left_out_leaves_the_trajectory(layout, sabotage):
    """The comparison above would see each of these mistakes."""
    skip_before(layout.name)
    found, expected = run_ranks(layout.world, on_layout, layout, 20, sabotage)[0], golden()
    worst = max(deviation(found[name], values[:20])[0] for name, values in expected.items())
    assert worst > 10 * TOLERANCE


def test_the_golden_file_is_what_its_command_makes():
    (again,) = run_ranks(1, dense, 3)
    for name, values in golden().items():
        assert again[name] == pytest.approx(values[:3], rel=1e-6)
