"""The job scripts of examples/slurm on a real Slurm cluster of two nodes: preempted, failed, refused, swept, chained.

A tiny model trains for real, PP 2 with a stage on each node, over gloo; jobs are signalled, nodes killed. Whatever
happened to a run, its metrics and weights are those of a run that nothing happened to. What this does not prove: NCCL
and GPUs (a pretended GPU is only counted), Pyxis (its flags are printed, not used), nodes that do not share a clock, a
kernel and a file system as these two do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import slurm_cluster
from tests.helpers.ranks import run_ranks
from tests.helpers.slurm_cluster import SlurmCluster, wait_for
from tests.helpers.training import (
    ROOT,
    assert_same_weights,
    make_workspace,
    read_lines,
    read_weights,
    run_training,
    training_arguments,
)

SCRIPTS = ROOT / "examples" / "slurm"
STEPS = {"num_steps": 12, "save_interval": 3}
LIMIT_S = 180.0
UNCHECKED = {"OISD_PREFLIGHT": "0"}
"""For tests of what comes after the preflight."""

pytestmark = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "there")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    lines: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]

    @classmethod
    def read(cls, output: Path) -> Run:
        return cls(read_lines(output), read_weights(output / "checkpoints", output / "exported"))

    def assert_same(self, output: Path) -> None:
        other = Run.read(output)
        assert other.lines == self.lines
        assert_same_weights(other.weights, self.weights)


@pytest.fixture(scope="module")
def whole(workspace: Path) -> Run:
    """A run without Slurm that nothing happened to."""
    for code, text in run_ranks(2, run_training, training_arguments(workspace, workspace / "whole", **STEPS)):
        assert code == 0, text
    return Run.read(workspace / "whole")


class Jobs:
    """Submits the scripts as a user of the cluster would, with the settings that two nodes on one machine need."""

    def __init__(self, cluster: SlurmCluster, workspace: Path, folder: Path) -> None:
        self.cluster, self.workspace, self.folder = cluster, workspace, folder
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {
            "PATH": path, "OISD_REPO": str(ROOT), "OISD_HOST_FORMAT": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
            "OISD_ENTRY": str(ROOT / "tests" / "helpers" / "train_parity.py"), "OISD_WAIT_S": "10",
        }  # fmt: skip
        self.options = ["--nodes=2", f"--output={folder}/job-%j.out"]

    def flags(self, output: Path, **changes: Any) -> list[str]:
        return training_arguments(self.workspace, output, **{**STEPS, **changes})

    def submit(self, output: Path, *options: str, settings: dict[str, str] | None = None, **changes: Any) -> int:
        return self.cluster.submit(
            *self.options, *options, SCRIPTS / "train.sbatch", *self.flags(output, **changes),
            environment=self.environment | (settings or {}),
        )  # fmt: skip

    def submit_many(self, kind: str, what: object, output: Path, *options: str) -> list[int]:
        """submit.sh chain or sweep."""
        said = self.cluster.run(
            "bash", SCRIPTS / "submit.sh", kind, what, *self.options, *options, "--", *self.flags(output),
            environment=self.environment | UNCHECKED,
        )  # fmt: skip
        return [int(line) for line in said.split()]

    def log(self, job: int | str) -> str:
        """What the batch script said."""
        file = self.folder / f"job-{job}.out"
        return file.read_text() if file.exists() else ""

    def wait_for_steps(self, job: int | str, output: Path, count: int) -> int:
        """Wait until a running job has finished ``count`` steps; how many it has."""

        def why() -> str:
            return self.cluster.logs() + self.log(job)

        def reached() -> bool:
            return count_steps(output) >= count and self.cluster.state(job) == "RUNNING"

        wait_for(reached, f"{count} steps", LIMIT_S, why)
        return count_steps(output)

    def finish(self, *jobs: int) -> None:
        states = self.cluster.wait_for_end(jobs, LIMIT_S)
        assert states == ["COMPLETED"] * len(jobs), "\n".join(self.log(job) for job in jobs)

    def restarts(self, job: int | str) -> int:
        return int(self.cluster.job(job)["Restarts"])


def count_steps(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def jobs(cluster: SlurmCluster, workspace: Path, tmp_path: Path) -> Jobs:
    return Jobs(cluster, workspace, tmp_path)


def test_a_run_that_is_preempted_twice_ends_as_one_that_is_not(jobs, whole, tmp_path):
    """First as before the time limit (USR1 to the script), then as by a job of higher priority (TERM to the tasks)."""
    output = tmp_path / "run"
    job = jobs.submit(output)
    steps = jobs.wait_for_steps(job, output, 2)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: jobs.restarts(job) == 1, "a restart", LIMIT_S, lambda: jobs.log(job))
    first = int((output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert steps <= first < STEPS["num_steps"]
    jobs.wait_for_steps(job, output, first + 2)
    jobs.cluster.run("scancel", "--signal=TERM", job)
    jobs.finish(job)
    assert jobs.restarts(job) == 2
    log = jobs.log(job)
    assert log.count("preflight: 2 nodes, 2 ranks") == 3
    assert log.count("left when asked to, at checkpoint") == log.count(": requeued") == 2
    assert f"at checkpoint {first}: requeued" in log
    for start in range(3):
        for rank in range(2):
            assert (output / "slurm" / f"{job}.{start}" / f"rank_{rank}.log").stat().st_size
    whole.assert_same(output)


def test_a_run_survives_the_death_of_both_nodes(jobs, whole, tmp_path):
    """One after the other. The first node runs the batch script and rank 0's store, the second only a rank."""
    output = tmp_path / "run"
    job = jobs.submit(output, settings=UNCHECKED)
    steps = 2
    for deaths, node in enumerate(slurm_cluster.NODES, start=1):
        jobs.wait_for_steps(job, output, steps + 2)
        jobs.cluster.kill_node(node)
        wait_for(lambda: jobs.cluster.state(job) == "PENDING", "a requeued job", LIMIT_S, jobs.cluster.logs)
        steps = count_steps(output)
        assert jobs.cluster.node_states()[node].startswith("down")
        jobs.cluster.start_node(node)
        wait_for(lambda: jobs.cluster.state(job) == "RUNNING", "another start", LIMIT_S, jobs.cluster.logs)
        assert jobs.restarts(job) == deaths
    jobs.finish(job)
    whole.assert_same(output)


def test_what_cannot_work_is_refused_at_once_and_not_requeued(jobs, workspace, tmp_path):
    """Every problem of a job in one message with the names of its nodes."""
    setup = tmp_path / "setup.sh"
    old = tmp_path / "old" / "megatron_core-0.15.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    setup.write_text(f'[[ $SLURMD_NODENAME != node2 ]] || export PYTHONPATH="{old.parent}:${{PYTHONPATH:-}}"\n')
    broken = tmp_path / "broken"
    shutil.copytree(workspace / "mcore", broken)
    for file in broken.glob("iter_*/*.distcp"):
        file.write_bytes(file.read_bytes()[:-100])
    wrong = [
        jobs.submit(tmp_path / "sizes", tp=2, load=tmp_path / "nowhere"),
        jobs.submit(tmp_path / "versions", settings={"OISD_SETUP": str(setup)}, load=broken),
        jobs.submit(tmp_path / "gpus", "--gres=gpu:2", oisd_layers=9, data=tmp_path / "none.jsonl"),
        jobs.submit(tmp_path / "python", settings={"OISD_VENV": "/nowhere"}),
    ]
    assert jobs.cluster.wait_for_end(wrong, LIMIT_S) == ["FAILED"] * 4
    for job in wrong:
        shown = jobs.cluster.job(job)
        assert (shown["ExitCode"], shown["Restarts"]) == ("78:0", "0")
        assert "not requeued" in jobs.log(job)
    sizes, versions, gpus, python = map(jobs.log, wrong)
    assert "preflight: 2 problems" in sizes
    assert "2 nodes x 1 ranks = 2 ranks are no multiple of TP 2 x PP 2 = 4: change --nodes" in sizes
    assert f"all 2 nodes: {tmp_path}/nowhere has no hf/" in sizes
    assert "preflight: 2 problems" in versions
    assert "megatron-core differs: 0.16.1 on node1; 0.15.0 on node2: install the same on all nodes" in versions
    assert "all 2 nodes: checkpoint" in versions
    assert "is damaged" in versions
    assert "preflight: 3 problems" in gpus
    assert "all 2 nodes: torch sees 0 GPUs, expected 2" in gpus
    assert "student layer 9 is outside" in gpus
    assert f"--data {tmp_path}/none.jsonl cannot be read" in gpus
    assert "/nowhere/bin/activate" in python


def test_wrong_flags_are_not_tried_again_and_failures_not_for_ever(jobs, tmp_path):
    """Without a preflight: the trainer's exit code 2 passes through the launcher, and so does that of a crash."""
    crash = tmp_path / "crash.py"
    crash.write_text("raise SystemExit(3)")
    settings = UNCHECKED | {"OISD_ENTRY": str(crash), "OISD_MAX_FAILURES": "1"}
    wrong = jobs.submit(tmp_path / "wrong", settings=UNCHECKED, reward="beauty")
    crashes = jobs.submit(tmp_path / "crashes", settings=settings)
    assert jobs.cluster.wait_for_end([wrong, crashes], LIMIT_S) == ["FAILED"] * 2
    ends = [(jobs.cluster.job(job)["ExitCode"], jobs.restarts(job)) for job in (wrong, crashes)]
    assert ends == [("2:0", 0), ("3:0", 1)]
    assert "error: " in jobs.log(wrong)
    assert "not requeued" in jobs.log(wrong)
    assert "failed (3), at checkpoint none: requeued" in jobs.log(crashes)
    assert "nothing new came of the last 2 starts: not requeued" in jobs.log(crashes)


def test_a_sweep_is_an_array_with_a_run_for_each_line(jobs, whole, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# learning rates\n--lr 1e-3\n\n--lr 5e-4 --oisd-lambda-attn 0\n")
    (job,) = jobs.submit_many("sweep", sweep, tmp_path / "runs", f"--output={tmp_path}/job-%A_%a.out")
    last = f"{job}_1"  # has the array's own number, which means all tasks elsewhere
    jobs.wait_for_steps(last, tmp_path / "runs" / "001", 2)
    jobs.cluster.run("scancel", "--signal=USR1", "--batch", last)
    states = jobs.cluster.wait_for_end([f"{job}_0", last], LIMIT_S)
    assert states == ["COMPLETED"] * 2, (tmp_path / f"job-{job}_0.out").read_text()
    assert [jobs.restarts(f"{job}_0"), jobs.restarts(last)] == [0, 1]
    whole.assert_same(tmp_path / "runs" / "000")
    other = read_lines(tmp_path / "runs" / "001")
    assert [line["step"] for line in other] == list(range(1, STEPS["num_steps"] + 1))
    assert other[-1]["actor/lr"] == 5e-4
    assert "oisd/attn" not in other[-1] or other[-1]["oisd/attn"] == 0


def test_a_chain_goes_on_where_a_job_ended_and_stops_when_the_run_is_finished(jobs, whole, tmp_path):
    output = tmp_path / "run"
    first, second, third = jobs.submit_many("chain", 3, output)
    jobs.wait_for_steps(first, output, 4)
    assert jobs.cluster.state(second) == "PENDING"
    jobs.cluster.run("scancel", first)
    assert jobs.cluster.wait_for_end([first], LIMIT_S) == ["CANCELLED"]
    jobs.finish(second, third)
    assert jobs.restarts(first) == 0
    assert "finished" in jobs.log(second)
    assert "nothing to do" in jobs.log(third)
    assert not (output / "slurm" / f"{third}.0" / "train.err").exists()
    whole.assert_same(output)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")
def test_a_run_takes_its_rollouts_from_a_node_of_their_own(jobs, tmp_path):
    """node1 trains, node2 serves: the trainer streams its weights there and trains on what comes back."""
    output = tmp_path / "run"
    settings = UNCHECKED | {"OISD_ROLLOUT_NODES": "1", "OISD_ROLLOUT_FLAGS": "--gpu-memory-utilization 0.1"}
    job = jobs.submit(output, settings=settings, pp=1, num_steps=2, rollout_retries=7)
    jobs.finish(job)
    assert "1 rollout servers answer" in jobs.log(job)
    lines = read_lines(output)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["training/rollout_probs_diff_max"] < 1e-4 for line in lines)
    logs = output / "slurm" / f"{job}.0"
    assert sorted(path.name for path in logs.glob("rank_*")) == ["rank_0.log"]
    assert "--host 127.0.0.1 --port" in (logs / "servers.out").read_text()


def test_scripts_are_whole_and_print_what_they_would_run(tmp_path):
    """Eight GPUs a node, servers of two GPUs each on the last node, in a container."""
    for script in sorted(SCRIPTS.glob("*.s*")):
        subprocess.run(["bash", "-n", script], check=True)
    settings = {
        "OISD_DRY_RUN": "1", "OISD_REPO": str(ROOT), "OISD_NODES": "a1,a2,a3", "SLURM_GPUS_ON_NODE": "8",
        "OISD_ROLLOUT_NODES": "1", "OISD_ROLLOUT_TP": "2", "OISD_HOST_FORMAT": "%s-ib0",
        "OISD_CONTAINER": "/images/oisd.sqsh", "OISD_MOUNTS": "/data:/data", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    flags = ["--load", "/data/mcore", "--output", str(tmp_path / "run"), "--bf16", "--temperature", "0.8"]
    result = subprocess.run(
        ["bash", SCRIPTS / "train.sbatch", *flags], env=os.environ | settings, text=True, check=True,
        stdout=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    probe, check, servers, train = (line for line in result.stdout.splitlines() if line.startswith("srun"))
    for line in (probe, check, servers, train):
        assert "--container-image=/images/oisd.sqsh --container-name=oisd-7" in line
        (mounts,) = re.findall(r"--container-mounts=(\S+)", line.replace("\\", ""))
        folders = {ROOT, tmp_path, tmp_path / "run"}
        assert set(mounts.split(",")) == {f"{folder}:{folder}" for folder in folders} | {"/data:/data"}
    assert "--nodes=3 --ntasks=3" in probe
    assert "--nodes=1 --ntasks=1" in check
    assert "--nodes=1 --ntasks=4 --ntasks-per-node=4 --nodelist=a3" in servers
    # tests/rl/test_serve_rollouts.py: model, precision and sampling come from the trainer's flags.
    assert "--tensor-parallel-size 2 --trainer-flags --load /data/mcore " in servers
    assert "--bf16 --temperature 0.8 --rollout-engine vllm_server" in servers
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=a1,a2" in train.replace("\\", "")
    urls = ",".join(f"http://a3-ib0:{30112 + index}" for index in range(4))
    assert f"--rollout-engine vllm_server --rollout-urls {urls}" in train.replace("\\", "")
    assert not (tmp_path / "run").exists()
