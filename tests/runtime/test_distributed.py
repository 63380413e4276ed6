"""Joining a process group: alone without torchrun, and the message for a world that TP x PP does not divide."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_oisd.errors import OISDError
from megatron_oisd.runtime import cpu, distributed
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize(("world", "tp", "pp"), [(1, 1, 1), (4, 2, 2), (8, 2, 2), (6, 1, 3), (2, 2, 1)])
def test_a_multiple_of_tp_times_pp_is_accepted(world, tp, pp):
    distributed.check_world_size(world, tp, pp)


@pytest.mark.parametrize(
    ("world", "tp", "pp", "message"),
    [
        (6, 2, 2, r"the world has 6 ranks, which TP 2 x PP 2 = 4 does not divide: start a multiple of 4 ranks"),
        (1, 2, 1, r"the world has 1 ranks, which TP 2 x PP 1 = 2 .*torchrun --nproc-per-node.*--tp / --pp"),
        (4, 0, 1, r"--tp is 0: expected an integer of at least 1"),
        (4, 1, -2, r"--pp is -2: expected an integer of at least 1"),
    ],
)
def test_other_sizes_are_refused_with_the_numbers(world, tp, pp, message):
    with pytest.raises(OISDError, match=message) as caught:
        distributed.check_world_size(world, tp, pp)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "etp"),
    [(2, 1, 1, 2, None), (4, 2, 1, 2, None), (2, 2, 1, 2, 1), (4, 1, 2, 2, 1), (8, 2, 1, 8, 1)],
)
def test_experts_may_be_laid_out_over_all_ranks(world, tp, pp, ep, etp):
    distributed.check_world_size(world, tp, pp, ep, etp)


@pytest.mark.parametrize(
    ("world", "tp", "pp", "ep", "etp", "message"),
    [
        (2, 2, 1, 2, None, r"2 ranks, which for the experts ETP 2 x EP 2 x PP 1 = 4 does not divide.*--ep / --etp"),
        (4, 1, 2, 4, 1, r"ETP 1 x EP 4 x PP 2 = 8 does not divide: start a multiple of 8 ranks"),
        (4, 1, 1, 0, None, r"--ep is 0: expected"),
        (4, 1, 1, 1, 0, r"--etp is 0: expected"),
    ],
)
def test_other_layouts_of_experts_are_refused(world, tp, pp, ep, etp, message):
    with pytest.raises(OISDError, match=message) as caught:
        distributed.check_world_size(world, tp, pp, ep, etp)
    assert "\n" not in str(caught.value)


@pytest.fixture
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    yield
    distributed.shutdown()
    cpu.uninstall()


def test_without_torchrun_a_world_of_one_is_made(alone):
    from megatron.core import parallel_state

    assert distributed.rank() == 0
    distributed.initialize(seed=7)
    drawn = torch.rand(3)
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    assert parallel_state.get_pipeline_model_parallel_world_size() == 1
    assert parallel_state.is_pipeline_first_stage()
    assert parallel_state.is_pipeline_last_stage()
    assert distributed.rank() == 0

    distributed.shutdown()
    assert not dist.is_initialized()
    assert not parallel_state.is_initialized()
    distributed.shutdown()

    distributed.initialize(seed=7)
    assert torch.equal(torch.rand(3), drawn), "a second start gives the same random numbers"


def test_a_refused_layout_touches_nothing(alone):
    with pytest.raises(OISDError, match="the world has 1 ranks, which TP 2 x PP 2 = 4"):
        distributed.initialize(tensor_parallel=2, pipeline_parallel=2)
    assert not dist.is_initialized()
    assert not cpu.is_installed()


def _refused() -> tuple[str, bool]:
    with pytest.raises(OISDError) as caught:
        distributed.initialize(tensor_parallel=2, pipeline_parallel=2)
    return str(caught.value), dist.is_initialized()


def test_every_rank_refuses_a_world_that_does_not_divide():
    """Before any collective, so that no rank waits for another."""
    for message, initialized in run_ranks(2, _refused, timeout_s=30.0):
        assert message.startswith("the world has 2 ranks, which TP 2 x PP 2 = 4 does not divide")
        assert not initialized


def _join() -> tuple[int, int, int, int]:
    from megatron.core import parallel_state

    distributed.initialize(tensor_parallel=2)
    try:
        total = torch.ones(1)
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return distributed.rank(), dist.get_world_size(), int(total), parallel_state.get_data_parallel_world_size()
    finally:
        distributed.shutdown()


def _expert_groups() -> tuple[int, int, int]:
    from megatron.core import parallel_state

    distributed.initialize(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=1)
    try:
        return (
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_data_parallel_group().size(),
        )
    finally:
        distributed.shutdown()


def test_experts_have_groups_of_their_own():
    assert run_ranks(2, _expert_groups, timeout_s=30.0) == [(2, 1, 1)] * 2


def test_torchruns_environment_makes_the_group():
    assert run_ranks(2, _join, timeout_s=30.0) == [(0, 2, 2, 1), (1, 2, 2, 1)]
