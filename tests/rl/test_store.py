"""Rollouts kept on disk come back exactly, and only to the run that they belong to."""

from __future__ import annotations

import pytest
import torch

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import Rollout
from megatron_oisd.rl.rollout.store import Experience, RolloutStore


def _experience() -> Experience:
    rollouts = [
        Rollout(prompt_ids=[1, 2, 3], response_ids=[9, 8], logprobs=[-0.1, -1 / 3], finish_reason="stop"),
        Rollout(prompt_ids=[1, 2, 3], response_ids=[7], logprobs=[-2.5e-7], finish_reason="length"),
        Rollout(prompt_ids=[4], response_ids=[5, 151_935], logprobs=[-1.0, 0.0], finish_reason="stop"),
        Rollout(prompt_ids=[4], response_ids=[], logprobs=[], finish_reason="length"),
    ]
    return Experience(
        groups=[17, 4], rollouts=rollouts, rewards=torch.tensor([[1.0, 0.1], [0.0, 0.0]]), rounds=3, sampled_groups=12
    )


def test_rollouts_come_back_exactly(tmp_path):
    store, written = RolloutStore(tmp_path / "kept", "a"), _experience()
    store.write(12, written)
    found = store.read(12)
    assert found is not None
    assert (found.groups, found.rollouts, found.rounds, found.sampled_groups) == ([17, 4], written.rollouts, 3, 12)
    assert torch.equal(found.rewards, written.rewards)
    assert found.rewards.dtype == written.rewards.dtype
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step_0000012.safetensors"]


def test_another_step_or_configuration_has_none(tmp_path):
    RolloutStore(tmp_path, "a").write(1, _experience())
    assert RolloutStore(tmp_path, "a").read(2) is None
    assert RolloutStore(tmp_path, "b").read(1) is None
    assert RolloutStore(tmp_path / "nowhere", "a").read(1) is None


def test_files_before_a_checkpoint_are_removed(tmp_path):
    store = RolloutStore(tmp_path, "a")
    for step in (1, 2, 3):
        store.write(step, _experience())
    (tmp_path / "step_mine.safetensors").write_text("not of the store")
    store.discard(before=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000003.safetensors", "step_mine.safetensors"]
    store.discard()
    assert store.read(3) is None
    RolloutStore(tmp_path / "nowhere", "a").discard()


def test_a_damaged_file_is_named(tmp_path):
    store = RolloutStore(tmp_path, "a")
    store.write(1, _experience())
    path = store.path(1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OISDError, match=r"step_0000001\.safetensors.*cannot be read.*remove"):
        store.read(1)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OISDError, match="--no-durable-rollouts"):
        RolloutStore(tmp_path / "file" / "kept", "a").write(1, _experience())
