"""Every layout of ``tests/layouts.py`` against the dense reference, loss and every gradient.

Why: each layout has its own way of scattering tokens, heads, vocabulary and stages, and each can give a right loss with
a wrong gradient. What is not proved here: NCCL, Transformer Engine, CUDA streams; MLA under tensor parallelism, where
Megatron's unfused spec gives plain GRPO wrong gradients already (its projections want Transformer Engine's duplicated
linear layer).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.mcore import Layout
from tests.helpers.mcore_reference import judge, reference
from tests.helpers.releases import skip_before
from tests.layouts import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_and_every_gradient_equal_the_reference(layout):
    skip_before(layout.name, *dict(layout.config))
    verdict = judge(layout)
    assert verdict.within(layout.tolerance), verdict


def test_names_are_unique():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


@pytest.mark.parametrize("model", ["dense", "moe", "mla", "window"])
def test_the_comparison_can_fail(model):
    """OISD changes every model's gradients by far more than any tolerance, so agreement means something."""
    skip_before({"moe": "MoE", "mla": "MLA", "window": "sliding windows"}.get(model, model))
    layout = Layout("with", model=model)
    _, with_oisd = reference(layout)
    _, without = reference(replace(layout, oisd=None))
    changes = [(with_oisd[name] - without[name]).norm() / with_oisd[name].norm() for name in with_oisd]
    assert min(changes) > 0.25
