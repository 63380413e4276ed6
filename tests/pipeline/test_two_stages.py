"""OISD on two pipeline stages: refusals, metrics, weights that change, stages that disagree, steps that fail.

Gradients are compared with those of the reference or of a step before, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline.lens import Lens
from megatron_oisd.rl.policy import ParallelGroups
from megatron_oisd.runtime import distributed
from tests.helpers import layout
from tests.helpers.layout import Batch, Case, largest_error, reference
from tests.helpers.one_chunk import CONFIG, Gradients, Model, build, differing
from tests.helpers.ranks import run_ranks

# ---------------------------------------------------------------------------------------------------------- two stages


def change_last_stage(norm: Tensor, head: Tensor) -> None:
    """In place, as an optimizer does."""
    norm.mul_(1.4)
    head.mul_(-0.7)


def _exported(model: Model) -> Gradients:
    from megatron_oisd.convert.weights import export_hf_weights

    groups = ParallelGroups.from_megatron()
    values = [parameter.data for parameter in model.bare.parameters()]
    for parameter in model.bare.parameters():
        parameter.data = parameter.main_grad.detach().clone()
    result = dict(export_hf_weights([model.bare], model.arguments, tp_group=groups.tp, pp_group=groups.pp))
    for parameter, value in zip(model.bare.parameters(), values, strict=True):
        parameter.data = value
    return result


def _two_stages(batch: Batch) -> dict[str, Any]:
    """Everything that is asked of two stages and leaves them at work, on one pair of processes."""
    distributed.initialize(pipeline_parallel=2)
    result: dict[str, Any] = {}
    try:
        model = build(tied=False, pp=2)
        hooks, keys = model.hooks(), list(model.chunk.state_dict())
        with pytest.raises(OISDError, match=r"student layer 4 is outside 1\.\.3"):
            model.attach(replace(CONFIG, layers=(4,)))
        result["refused"] = model.hooks() == hooks and model.config.finalize_model_grads_func is model.finalize

        oisd = model.attach()
        result["state_dict"] = list(model.chunk.state_dict()) == keys
        model.train(oisd, batch)
        result["before"] = _exported(model)
        result["metrics"], result["read twice"] = oisd.metrics(), oisd.metrics()

        with pytest.raises(FloatingPointError), oisd.step(num_microbatches=4, num_sequences=4, num_tokens=40):
            raise FloatingPointError
        model.train(oisd, batch)
        result["after exception"] = _exported(model)

        def change() -> None:
            if model.bare.post_process:
                with torch.no_grad():
                    change_last_stage(model.bare.decoder.final_layernorm.weight, model.bare.output_layer.weight)

        refresh = Lens.refresh
        change()
        Lens.refresh = lambda *args: None
        model.train(oisd, batch)
        result["stale"] = _exported(model)
        Lens.refresh = refresh
        model.train(oisd, batch)
        result["automatic"] = _exported(model)
        change()
        oisd.sync()
        Lens.refresh = lambda *args: None  # a step after sync() must not need another
        model.train(oisd, batch)
        result["by hand"] = _exported(model)
        Lens.refresh = refresh
        oisd.detach()
        result["detached"] = model.hooks() == hooks and model.config.finalize_model_grads_func is model.finalize
        return result
    finally:
        distributed.shutdown()


@pytest.fixture(scope="module")
def two_stages(batch: Batch) -> list[dict[str, Any]]:
    return run_ranks(2, _two_stages, batch, timeout_s=60.0)


def test_both_stages_refuse_attach_and_detach_alike(two_stages):
    for result in two_stages:
        assert result["refused"]
        assert result["state_dict"]
        assert result["detached"]


def test_metrics_are_equal_on_both_stages(two_stages, batch):
    first, last = two_stages
    assert first["metrics"] == last["metrics"]
    assert first["metrics"]["oisd/js/layer_2"] > 0
    values, _ = reference(Case(tied=False), batch)
    assert first["metrics"]["oisd/think/layer_2"] == pytest.approx(values["oisd/think/layer_2"], rel=2e-5)
    for result in two_stages:
        assert set(result["read twice"].values()) == {0.0}


def test_an_exception_with_nothing_under_way_leaves_nothing_on_two_stages(two_stages):
    for result in two_stages:
        assert differing(result["after exception"], result["before"]) == []


@pytest.mark.parametrize(("name", "changes"), [("before", 0), ("automatic", 1), ("by hand", 2)])
def test_the_lens_on_another_stage_follows_the_last_stages_weights(two_stages, batch, monkeypatch, name, changes):
    changed = layout.hf_model(False)
    with torch.no_grad():
        for _ in range(changes):
            change_last_stage(changed.model.norm.weight, changed.lm_head.weight)
    monkeypatch.setattr(layout, "hf_model", lambda tied: changed)
    _, expected = reference(Case(tied=False), batch)
    for result in two_stages:
        error, parameter = largest_error(result[name], expected)
        assert error < 2e-5, f"{parameter} is off by {error:.1e}"
    if changes == 1:
        assert largest_error(two_stages[0]["stale"], expected)[0] > 1e-2, "without the refresh it does not"


def _disagree(batch: Batch, masks: list[Tensor], advantages: list[Tensor]) -> None:
    """The first stage must find it out; the last, left without its partner, is ended by the test."""
    distributed.initialize(pipeline_parallel=2)
    model = build(tied=False, pp=2)
    rank = dist.get_rank()
    model.train(model.attach(), replace(batch, mask=masks[rank], advantages=advantages[rank]))
    dist.barrier()


def _moved(mask: Tensor) -> Tensor:
    return torch.cat([mask[:, 1:], mask[:, :1]], dim=1)


def _fewer(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[1, mask[1].nonzero()[0]] = False
    return mask


@pytest.mark.parametrize(
    "what",
    [
        "fewer on the last",
        "fewer on the first",
        "other positions",
        "other advantages",
    ],
)
def test_stages_that_disagree_about_a_microbatch_say_so(batch, what):
    masks, advantages = [batch.mask, batch.mask], [batch.advantages, batch.advantages]
    if what == "fewer on the last":
        masks[1] = _fewer(batch.mask)
    elif what == "fewer on the first":
        masks[0] = _fewer(batch.mask)
    elif what == "other positions":
        masks[1] = _moved(batch.mask)
    else:
        advantages[1] = -batch.advantages
    with pytest.raises(AssertionError, match="loss_mask and advantages must be the same on every pipeline stage"):
        run_ranks(2, _disagree, batch, masks, advantages, timeout_s=30.0)


def _fail_under_way(batch: Batch, sent: bool) -> Gradients:
    """Both stages fail in a forward pass, the last one before or after its teacher was sent; then a good step.

    The pipeline schedule is not run in the failing step: it would lose messages of its own.
    """
    distributed.initialize(pipeline_parallel=2)
    try:
        model = build(tied=False, pp=2)
        oisd = model.attach()
        if model.bare.post_process:
            model.bare.set_input_tensor(torch.ones(batch.tokens.shape[1], 1, model.config.hidden_size))

        def failing_step() -> None:
            with oisd.step(num_microbatches=1, num_sequences=1, num_tokens=9):
                with oisd.microbatch(model.chunk, loss_mask=batch.mask[:1], advantages=batch.advantages[:1]):
                    model.forward(batch.tokens[:1])
                    if not sent:
                        raise FloatingPointError
                raise FloatingPointError

        with pytest.raises(FloatingPointError):
            failing_step()
        dist.barrier()
        model.train(oisd, batch)
        return _exported(model)
    finally:
        distributed.shutdown()


@pytest.mark.parametrize("sent", [False, True], ids=["before sending", "after sending"])
def test_a_step_that_failed_with_a_teacher_under_way_spoils_no_later_one(two_stages, batch, sent):
    """The next step is right or refused: a message left over must neither be taken for its own nor block it."""
    try:
        results = run_ranks(2, _fail_under_way, batch, sent, timeout_s=30.0)
    except AssertionError as failure:
        assert "OISDError: " in str(failure)  # noqa: PT017
    else:
        for gradients, expected in zip(results, two_stages, strict=True):
            assert differing(gradients, expected["before"]) == []
