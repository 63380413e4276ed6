"""The training command on gloo ranks, with a random tiny model and arithmetic problems."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_oisd.rl.metrics_log import read_metrics
from tests.helpers.checkpoints import make_hf_checkpoint
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("OISD_DATA", ROOT.parent / "shared" / "data"))
SMALL = {
    "prompts_per_step": 4, "mini_batch_prompts": 2, "samples_per_prompt": 4, "micro_batch_size": 2,
    "max_prompt_tokens": 128, "max_response_tokens": 12, "lr": 1e-3, "pp": 2, "oisd_layers": 2, "save_interval": 2,
    "oisd_attn_queries": 4,
    "reward": "parity",
}  # fmt: skip


def load_script(path: str) -> Any:
    """The script at ``path`` as a module, with its own folder importable."""
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


def make_workspace(folder: Path) -> Path:
    """Write a random tiny model as Megatron checkpoint, and arithmetic problems."""
    load_script("examples/quickstart/make_model.py").make_random_model(folder / "hf", seed=0)
    load_script("examples/quickstart/arithmetic.py").write_split(folder / "train.jsonl", "train", 64, seed=0)
    run_ranks(1, _convert, folder / "hf", folder / "mcore")
    return folder


def make_experts_workspace(workspace: Path, folder: Path) -> Path:
    """The same with four experts in three of four layers, of Qwen3-MoE."""
    make_hf_checkpoint(
        folder / "hf", tied=False, family="Qwen3Moe", vocab_size=384, max_position_embeddings=512, mlp_only_layers=[1],
        norm_topk_prob=False, output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    for path in [*(workspace / "hf").glob("*token*"), workspace / "hf" / "chat_template.jinja"]:
        shutil.copy(path, folder / "hf")
    shutil.copy(workspace / "train.jsonl", folder)
    run_ranks(1, _convert, folder / "hf", folder / "mcore")
    return folder


def _convert(source: Path, target: Path) -> None:
    from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore

    convert_hf_to_mcore(source, target, progress=False)


def training_arguments(workspace: Path, output: Path, **changes: Any) -> list[str]:
    values = {"load": workspace / "mcore", "data": workspace / "train.jsonl", "output": output, **SMALL, **changes}
    result: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        result += [flag] if value is True else [flag, str(value)]
    return result


def add_parity_reward() -> None:
    """A random model never answers right; this rule gives it rewards of both kinds."""
    from megatron_oisd.rl.rewards import REWARDS

    REWARDS["parity"] = lambda response, truth: float(len(response) % 2)


def run_training(arguments: list[str]) -> tuple[int, str]:
    """The command on this rank: its exit code and what it said on stderr."""
    add_parity_reward()
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        code = load_script("tools/train_rl.py").main(arguments)
    return code, text.getvalue()


def read_lines(output: Path) -> list[dict[str, Any]]:
    """Every step's metrics without what depends on the clock."""
    clock = ("time", "timing_s/", "perf/throughput")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in read_metrics(output)]


def read_weights(checkpoints: Path, target: Path) -> dict[str, Any]:
    """The newest weights in a Megatron checkpoint directory under HF names, read through the converter."""
    from safetensors.torch import load_file

    run_ranks(1, _export, checkpoints, target)
    return {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _export(checkpoints: Path, target: Path) -> None:
    from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf

    convert_mcore_to_hf(checkpoints, target, progress=False)


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
