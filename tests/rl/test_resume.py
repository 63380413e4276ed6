"""A run that is killed, stopped or moved to another layout follows the trajectory of one that never was.

Runs under the real schedules, optimizer and checkpoints on gloo ranks. A killed process is killed with SIGKILL, so
nothing of it can tidy up. What this does not prove: that NCCL or CUDA kernels repeat bit for bit, and that a file
system keeps what it said was synced when a machine loses power.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megatron_oisd.convert.manifest import MANIFEST
from megatron_oisd.rl.preemption import REQUEUE_EXIT_CODE
from tests.helpers.ranks import kill_ranks, run_ranks
from tests.helpers.training import (
    ROOT,
    assert_same_weights,
    load_script,
    read_lines,
    read_weights,
    run_training,
    training_arguments,
)

KILLS = 20


def _train(arguments: list[str], world_size: int = 2) -> None:
    for code, text in run_ranks(world_size, run_training, arguments):
        assert code == 0, text


def test_twenty_sigkills_lose_nothing(workspace, tmp_path):
    """Killed 20 times at random moments and started again, a run ends with the same metrics and weights."""
    steps = {"num_steps": 24, "save_interval": 3, "dynamic_sampling": True, "dynamic_sampling_max_rounds": 2}
    start = time.monotonic()
    _train(training_arguments(workspace, tmp_path / "whole", **steps))
    seconds = time.monotonic() - start
    arguments = training_arguments(workspace, tmp_path / "killed", resume=True, **steps)
    moments = random.Random(11)
    kills, finished = 0, False
    while kills < KILLS and not finished:
        # From the first imports to about a quarter of the whole run; rank 0 or 1 goes first.
        after = moments.uniform(0.05, max(1.0, seconds / 4))
        finished = bool(kill_ranks(2, run_training, arguments, after_s=after, first=moments.randrange(2)))
        kills += not finished
    _train(arguments)
    assert kills >= KILLS // 2, "the run ended before it could be killed: shorten the moments"
    whole, killed = read_lines(tmp_path / "whole"), read_lines(tmp_path / "killed")
    assert [line["step"] for line in whole] == list(range(1, 25))
    assert killed == whole
    assert max(line["rollout/rounds"] for line in whole) == 2
    assert_same_weights(
        *(read_weights(tmp_path / name / "checkpoints", tmp_path / f"{name} hf") for name in ("whole", "killed"))
    )
    assert list((tmp_path / "killed" / "rollout_state").iterdir()) == []


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_run_goes_on_at_another_layout(workspace, tmp_path, distributed_optimizer):
    """PP 2 for two steps, then TP 2 with sequence parallelism, then PP 2 again: as PP 2 all the way, up to rounding."""
    common = {"save_interval": 2, "use_distributed_optimizer": True} if distributed_optimizer else {"save_interval": 2}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    _train(training_arguments(workspace, whole, num_steps=6, **common))
    _train(training_arguments(workspace, moved, num_steps=2, **common))
    for steps, layout in ((4, {"pp": 1, "tp": 2, "sequence_parallel": True}), (6, {"pp": 2, "tp": 1})):
        _train(training_arguments(workspace, moved, num_steps=steps, resume=True, **common, **layout))
    one, other = read_lines(whole), read_lines(moved)
    for mine, theirs in zip(one, other, strict=True):
        assert mine["critic/rewards/mean"] == theirs["critic/rewards/mean"]
        for name in ("actor/loss", "actor/grad_norm", "actor/entropy", "oisd/think/layer_2", "oisd/attn/layer_2"):
            assert theirs[name] == pytest.approx(mine[name], rel=2e-3, abs=2e-5), (mine["step"], name)
    one_weights, other_weights = (
        read_weights(run / "checkpoints", tmp_path / f"{run.name} hf") for run in (whole, moved)
    )
    # In norm: Adam moves an element whose gradient is nearly 0 by a full step in a direction that rounding decides.
    norms = {name: weights.norm().item() for name, weights in one_weights.items()}
    worst = max((one_weights[name] - other_weights[name]).norm().item() / norms[name] for name in norms)
    assert worst < 5e-6  # seen: 1e-6; six steps of Adam at lr 1e-3 move a tensor by some 0.1


def test_an_optimizer_saved_for_one_layout_loads_there_only(workspace, tmp_path):
    common = {"save_interval": 2, "use_distributed_optimizer": True, "no_dist_ckpt_optim_fully_reshardable": True}
    _train(training_arguments(workspace, tmp_path / "whole", num_steps=4, **common))
    _train(training_arguments(workspace, tmp_path / "parts", num_steps=2, **common))
    elsewhere = {"num_steps": 4, "resume": True, "pp": 1, "tp": 2, "sequence_parallel": True}
    for code, text in run_ranks(
        2, run_training, training_arguments(workspace, tmp_path / "parts", **common | elsewhere)
    ):
        assert code == 2
        assert "was saved at TP 1 x PP 2 for that layout only" in text
    _train(training_arguments(workspace, tmp_path / "parts", num_steps=4, resume=True, **common))
    assert read_lines(tmp_path / "parts") == read_lines(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_leave_checkpoints_and_goes_on(workspace, tmp_path, number):
    """The real command in a process of its own: exit code 75, a checkpoint, and the same trajectory afterwards."""
    steps = {"num_steps": 5, "pp": 1, "save_interval": 5, "reward": "exact_match"}
    command = [sys.executable, str(ROOT / "tools" / "train_rl.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "left"
    process = subprocess.Popen(
        [*command, *training_arguments(workspace, output, **steps)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == REQUEUE_EXIT_CODE, said
    assert "--resume" in said
    latest = int((output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 1 <= latest < 5
    _train(training_arguments(workspace, output, resume=True, **steps), world_size=1)
    _train(training_arguments(workspace, tmp_path / "whole", **steps), world_size=1)
    assert read_lines(output) == read_lines(tmp_path / "whole")


def test_checkpoints_have_manifests_that_resuming_does_not_need(workspace, tmp_path, capsys):
    """Every rank's files are in it, the tool reads them against it, and a run goes on without."""
    _train(training_arguments(workspace, tmp_path, num_steps=2, save_interval=1, use_distributed_optimizer=True))
    checkpoints, verify = tmp_path / "checkpoints", load_script("tools/verify_checkpoint.py").main
    for number in (1, 2):
        directory = checkpoints / f"iter_{number:07d}"
        files = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= set(files)
        assert sorted(json.loads((directory / MANIFEST).read_text())["files"]) == files
        assert verify(["--mcore", str(checkpoints), "--iteration", str(number)]) == 0
        assert f"{directory}: all {len(files)} files are as written" in capsys.readouterr().out
    stored = checkpoints / "iter_0000002" / "__1_0.distcp"
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(data)
    assert verify(["--mcore", str(checkpoints)]) == 2
    assert f"{stored} is damaged or was changed" in capsys.readouterr().err
    data[len(data) // 2] ^= 1
    stored.write_bytes(data)
    manifests = list(checkpoints.rglob(MANIFEST))
    assert len(manifests) == 3  # two iterations and hf/
    for path in manifests:
        path.unlink()
    _train(training_arguments(workspace, tmp_path, num_steps=3, resume=True, use_distributed_optimizer=True))
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]


def test_a_damaged_newest_checkpoint_is_passed_over(workspace, tmp_path):
    steps = {"num_steps": 4, "save_interval": 1, "keep_checkpoints": 3}
    _train(training_arguments(workspace, tmp_path / "run", **steps))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    newest = tmp_path / "run" / "checkpoints" / "iter_0000004"
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    with_warning = training_arguments(workspace, tmp_path / "run", resume=True, **steps)
    (code, text), _ = run_ranks(2, run_training, with_warning)
    assert code == 0, text
    assert "going back to an earlier checkpoint" in text
    assert read_lines(tmp_path / "run") == read_lines(tmp_path / "copy")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000002", "iter_0000003", "iter_0000004"]
    for iteration in kept:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / iteration)
    for code, text in run_ranks(2, run_training, with_warning):
        assert code == 2
        assert "iter_0000004 does not exist" in text


def test_a_finished_run_has_nothing_to_do(workspace, tmp_path):
    steps = {"num_steps": 1, "pp": 1}
    _train(training_arguments(workspace, tmp_path / "run", **steps), world_size=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    _train(training_arguments(workspace, tmp_path / "run", resume=True, **steps), world_size=1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert json.loads(before)["step"] == 1
