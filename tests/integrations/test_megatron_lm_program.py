"""Megatron-LM's ``train_rl.py`` as a whole program with OISD: command line, ``pretrain()``, bf16, Adam, loggers,
checkpoints, on a CPU and with made-up rollouts (``tests/helpers/megatron_lm_cpu.py`` says what is replaced).

Each test needs the checkout that MEGATRON_LM_PATH names. What one update computes is proved by ``test_megatron_lm.py``.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers.megatron_lm import MODEL, ON_CPU, ROOT, TRAINING, call, make_tokenizer, run_script, why_not_run
from tests.helpers.megatron_lm_cases import parse_for_8_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if why_not_run():
        pytest.skip(why_not_run())
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


PIPELINE = ["--pipeline-model-parallel-size", "2", "--rl-use-sequence-packing"]
OISD = ["--oisd-layers", "2", "--oisd-lambda-think", "20", "--oisd-lambda-attn", "20"]


@dataclass(frozen=True)
class Run:
    """What a run of the program left."""

    folder: Path
    lines: list[dict[str, str]]
    """The console's line of each update, by what it names; without what depends on the clock."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything of tensors in its checkpoint, optimizer state included."""
        return read_tensors(next((self.folder / "checkpoints").glob("iter_*")))


@pytest.fixture(scope="module")
def program(tokenizer: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Run the program; each command once."""
    known: dict[tuple[str, ...], Run] = {}

    def run(mode: str, *arguments: str, world: int = 2) -> Run:
        if (mode, *arguments) not in known:
            folder = tmp_path_factory.mktemp("run")
            own = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
            own += ["--tensorboard-dir", str(folder / "tensorboard")]
            code, log = run_script(
                world, [mode, *MODEL, *ON_CPU, *TRAINING, *tokenizer, *own, *arguments], folder / "log"
            )
            assert code == 0, log[-6000:]
            known[mode, *arguments] = Run(folder, read_lines(log))
        return known[mode, *arguments]

    return run


def read_lines(log: str) -> list[dict[str, str]]:
    """Megatron-LM's console lines."""
    lines = []
    for line in re.findall(r"iteration +\d+/ +\d+ \|(.*)", log):
        parts = (part.partition(":") for part in line.split(" | "))
        values = {name.strip(" |"): value.strip(" |") for name, _, value in parts}
        lines.append({n: v for n, v in values.items() if "time" not in n and "toks" not in n and "oisd_wait" not in n})
    return lines


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = checkpoint.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(state, checkpoint_id=directory, no_dist=True)
    return state


def test_lambda_0_is_train_rl(program: Callable[..., Run]) -> None:
    """Three updates: the console's numbers and every tensor of the checkpoint, bit for bit."""
    plain = program("plain", *PIPELINE)
    off = program("oisd", *PIPELINE, "--oisd-layers", "2", "--oisd-lambda-think", "0", "--oisd-lambda-attn", "0")
    assert len(plain.lines) == 3
    assert off.lines == plain.lines
    expected, found = plain.tensors, off.tensors
    assert any("exp_avg_sq" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_train_rl_with_oisd(program: Callable[..., Run]) -> None:
    plain, oisd = program("plain", *PIPELINE), program("oisd", *PIPELINE, *OISD)
    assert len(oisd.lines) == 3
    for line in oisd.lines:
        assert 0 < float(line["oisd/js/layer_2"]) < math.log(2)
        assert 0 < float(line["oisd/attn_js/layer_2"]) < math.log(2)
    # The same rollouts and weights at first: what the first update starts from is the same, its gradient is not.
    assert oisd.lines[0]["rl/entropy_term"] == plain.lines[0]["rl/entropy_term"]
    assert oisd.lines[0]["grad norm"] != plain.lines[0]["grad norm"]
    expected, found = plain.tensors, oisd.tensors
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert not torch.equal(
        found["decoder.layers.mlp.linear_fc2.weight"], expected["decoder.layers.mlp.linear_fc2.weight"]
    )
    assert all(tensor.isfinite().all() for tensor in found.values() if tensor.is_floating_point())


def test_metrics_are_where_megatron_lm_writes_its_own(program: Callable[..., Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = program("oisd", *PIPELINE, *OISD)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    for name in (
        *("oisd/think", "oisd/attn", "oisd/js/layer_2", "oisd/attn_js/layer_2", "oisd/think_weight/layer_2"),
        *("oisd/transport/teacher_bytes", "timing_s/oisd_wait", "oisd/js/layer_2 vs samples", "rl/kl_term"),
    ):
        values = events.Scalars(name)
        assert len(values) == 3, name
        assert all(math.isfinite(value.value) for value in values), name
    assert [value.step for value in events.Scalars("oisd/js/layer_2")] == [1, 2, 3]


def test_layouts_train_alike(program: Callable[..., Run]) -> None:
    """From one checkpoint, in bf16: one process with rollouts in rows against two stages with packed ones."""
    start = ["--pretrained-checkpoint", str(program("plain", *PIPELINE).folder / "checkpoints")]
    two, one = program("oisd", *PIPELINE, *OISD, *start), program("oisd", *OISD, *start, world=1)
    for index, tolerance in ((0, 0.01), (2, 0.05)):  # later updates start from weights rounded to bf16 each time
        for name in ("oisd/js/layer_2", "oisd/attn_js/layer_2", "grad norm"):
            assert float(two.lines[index][name]) == pytest.approx(float(one.lines[index][name]), rel=tolerance), name


def test_a_run_goes_on_with_and_without_oisd(program: Callable[..., Run]) -> None:
    """Its checkpoint is one of train_rl.py, which reads it, optimizer and all."""
    first = program("oisd", *PIPELINE, *OISD)
    # Megatron-LM compares the lengths of schedules, even of constant ones.
    further = [*PIPELINE, "--train-iters", "6", "--override-opt-param-scheduler"]
    further += ["--load", str(first.folder / "checkpoints")]
    for mode, arguments in (("oisd", OISD), ("plain", [])):
        lines = program(mode, *further, *arguments).lines
        assert len(lines) == 3
        assert lines[0]["consumed samples"] == "32"
        assert ("oisd/js/layer_2" in lines[0]) == (mode == "oisd")


def test_the_distributed_optimizer_with_overlap(program: Callable[..., Run]) -> None:
    overlap = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    apart, together = (program("oisd", *OISD, "--rl-use-sequence-packing", *more) for more in ([], overlap))
    for one, other, tolerance in zip(apart.lines, together.lines, (1e-3, 1e-2, 1e-2), strict=True):  # as above
        for name in ("oisd/js/layer_2", "oisd/attn_js/layer_2", "grad norm"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=tolerance), name


def test_a_refusal_is_one_line(tokenizer: list[str], tmp_path: Path) -> None:
    arguments = [*MODEL, *ON_CPU, *TRAINING, *tokenizer, *OISD, "--micro-batch-size", "2"]
    code, log = run_script(1, ["oisd", *arguments], tmp_path / "log")
    assert code != 0
    assert "error: --micro-batch-size is 2: train_rl.py gives the model packed sequences in one row" in log
    assert "OISDError" not in log.partition("error: --micro")[0]


def test_the_guides_command_is_accepted(tmp_path: Path) -> None:
    """Up to the point where Megatron-LM would start 8 ranks; with its own model's arguments from its checkout."""
    text = (ROOT / "docs" / "megatron_lm.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$OUT"\n')
    torchrun.chmod(0o755)
    variables = {"PATH": f"{torchrun.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "arguments")}
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=ROOT, env=os.environ | variables, check=True)
    ranks, number, script, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert (ranks, number) == ("--nproc-per-node", "8")
    assert Path(script) == ROOT / "examples" / "megatron_lm" / "train_rl_oisd.py"
    (found,) = call(1, tmp_path / "call", parse_for_8_ranks, arguments)
    assert found == {
        "layers": (6,), "data_parallel_size": 2, "micro_batch_size": 1, "rl_use_sequence_packing": True,
        "tokenizer_model": str(ROOT / "Qwen3-4B-mcore" / "hf"), "pretrained_checkpoint": str(ROOT / "Qwen3-4B-mcore"),
    }  # fmt: skip
