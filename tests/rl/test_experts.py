"""Training a mixture of experts: expert parallelism changes where things are computed and nothing else.

The engine's log-probabilities beside the trainer's show that what was exported is what is trained; the weights after
the steps show that experts and the rest were updated alike. What this does not prove: dispatchers other than
``alltoall``, grouped kernels, and a load-balancing loss, which training does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.convert.checkpoint import read_arguments
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.config import TrainConfig
from megatron_oisd.rl.setup import check_experts
from tests.helpers.ranks import run_ranks
from tests.helpers.training import (
    make_experts_workspace,
    read_lines,
    read_weights,
    run_training,
    training_arguments,
)

SMALL = {"pp": 1, "save_interval": 1, "oisd_lambda_think": 10, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def experts(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``workspace``, with experts."""
    return make_experts_workspace(workspace, tmp_path_factory.mktemp("experts"))


def _train(folder: Path, output: Path, ranks: int = 2, **changes: Any) -> list[dict[str, Any]]:
    for code, text in run_ranks(ranks, run_training, training_arguments(folder, output, **{**SMALL, **changes})):
        assert code == 0, text
    return read_lines(output)


def _assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]], name: str) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine["critic/rewards/mean"] == theirs["critic/rewards/mean"], name
        assert theirs["rollout/log_prob_diff_max"] < 1e-4, name
        for metric in ("actor/loss", "actor/grad_norm", "oisd/think/layer_2", "oisd/attn/layer_2"):
            assert theirs[metric] == pytest.approx(mine[metric], rel=1e-3, abs=2e-5), (name, mine["step"], metric)


def _assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], name: str) -> None:
    assert one.keys() == other.keys()
    # In norm: Adam moves an element whose gradient is nearly 0 by a full step in a direction that rounding decides.
    errors = {key: ((one[key] - other[key]).norm() / one[key].norm()).item() for key in one}
    assert max(errors.values()) < 1e-4, (name, max(errors, key=errors.__getitem__))


def test_expert_parallel_takes_the_same_steps(experts: Path, tmp_path: Path) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "ep1": {},
        "ep2": {"ep": 2},
        "ep2, token budget": {"ep": 2, "max_tokens_per_microbatch": 160},
        "tp2, etp1": {"tp": 2, "sequence_parallel": True, "etp": 1},
        "tp2, ep2": {"tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1},
        "pp2, ep2": {"pp": 2, "ep": 2, "ranks": 4},
    }
    before = read_weights(experts / "mcore", tmp_path / "before")
    lines, weights = {}, {}
    for name, layout in layouts.items():
        lines[name] = _train(experts, tmp_path / name, num_steps=2, **layout)
        weights[name] = read_weights(tmp_path / name / "checkpoints", tmp_path / f"{name} hf")
        # Of two replicas one writes, of two halves both do.
        files = list((tmp_path / name / "checkpoints" / "iter_0000002").glob("*.distcp"))
        assert len(files) == layout.get("ranks", 2 if layout else 1)
    moved = {key: ((weights["ep1"][key] - before[key]).norm() / before[key].norm()).item() for key in before}
    for part in ("experts.3.gate_proj", "experts.0.down_proj", "mlp.gate.weight", "q_proj", "layers.1.mlp.up_proj"):
        assert min(change for key, change in moved.items() if part in key) > 1e-3, part
    for name in layouts:
        _assert_alike(lines["ep1"], lines[name], name)
        _assert_same_weights(weights["ep1"], weights[name], name)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_run_goes_on_at_another_expert_parallel_size(
    experts: Path, tmp_path: Path, distributed_optimizer: bool
) -> None:
    common = {"use_distributed_optimizer": True} if distributed_optimizer else {}
    whole = _train(experts, tmp_path / "whole", num_steps=4, **common)
    for steps, layout in ((1, {"ep": 2}), (2, {"ep": 1}), (3, {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True})):
        _train(
            experts, tmp_path / "moved", num_steps=steps, **common, **layout, **({"resume": True} if steps > 1 else {})
        )
    moved = _train(experts, tmp_path / "moved", num_steps=4, resume=True, ep=2, **common)
    _assert_alike(whole, moved, "moved")
    weights = [read_weights(tmp_path / name / "checkpoints", tmp_path / f"{name} hf") for name in ("whole", "moved")]
    _assert_same_weights(*weights, "moved")


def test_an_optimizer_saved_for_one_layout_loads_there_only(experts: Path, tmp_path: Path) -> None:
    common = {"use_distributed_optimizer": True, "no_dist_ckpt_optim_fully_reshardable": True, "ep": 2}
    whole = _train(experts, tmp_path / "whole", num_steps=2, **common)
    _train(experts, tmp_path / "parts", num_steps=1, **common)
    elsewhere = {**SMALL, **common, "num_steps": 2, "resume": True, "ep": 1}
    for code, text in run_ranks(2, run_training, training_arguments(experts, tmp_path / "parts", **elsewhere)):
        assert code == 2
        assert "was saved at TP 1 x PP 1 x EP 2 x ETP 1 for that layout only" in text
    assert _train(experts, tmp_path / "parts", num_steps=2, resume=True, **common) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ep": 3}, "--ep is 3, which does not divide the model's 4 experts"),
        ({"tp": 2}, "--tp 2 with experts needs --sequence-parallel"),
        ({"tp": 2, "sequence_parallel": True, "etp": 4}, "--etp is 4 and --tp 2"),
        ({"tp": 5, "sequence_parallel": True}, "within experts is 5, which does not divide their width 48"),
        ({"pp": 4}, "--pp 4 makes a pipeline stage of layers 2 to 2, none of which has experts"),
    ],
)
def test_layouts_that_do_not_suit_the_experts_are_refused(experts: Path, changes: dict[str, Any], words: str) -> None:
    arguments = read_arguments(experts / "mcore")
    config = {"load": "x", "data": "x", "output": "x"}
    check_experts(TrainConfig(**config, ep=2), arguments)
    with pytest.raises(OISDError, match=words) as caught:
        check_experts(TrainConfig(**config, **changes), arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), [({"ep": 2}, "--ep is 2"), ({"etp": 1}, "--etp is 1")])
def test_experts_flags_need_experts(workspace: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    arguments = training_arguments(workspace, tmp_path / "out", num_steps=1, pp=1, **changes)
    for code, text in run_ranks(2, run_training, arguments):
        assert code == 2
        assert f"{words}, and Qwen3ForCausalLM has no experts" in text
