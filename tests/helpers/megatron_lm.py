"""Starts processes of the Megatron-LM checkout that MEGATRON_LM_PATH names, and looks into its sources."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.integrations.megatron_lm import CHECKOUT

ROOT = Path(__file__).resolve().parents[2]

MODEL = [
    "--num-layers",
    "4",
    "--hidden-size",
    "64",
    "--ffn-hidden-size",
    "96",
    "--num-attention-heads",
    "4",
    "--group-query-attention",
    "--num-query-groups",
    "2",
    "--kv-channels",
    "32",
    "--seq-length",
    "32",
    "--max-position-embeddings",
    "128",
    "--normalization",
    "RMSNorm",
    "--norm-epsilon",
    "1e-6",
    "--qk-layernorm",
    "--position-embedding-type",
    "rope",
    "--rotary-base",
    "10000",
    "--swiglu",
    "--disable-bias-linear",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    "--untie-embeddings-and-output-weights",
]
"""A tiny Qwen3-like model in Megatron-LM's arguments; the model of ``tests/helpers/mcore.py``."""

ON_CPU = [
    "--distributed-backend",
    "gloo",
    "--transformer-impl",
    "local",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
    "--use-cpu-initialization",
    "--attention-softmax-in-fp32",
]
"""What a machine without CUDA and Transformer Engine needs."""

TRAINING = [
    "--bf16",
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "8",
    "--train-iters",
    "3",
    "--lr",
    "1e-3",
    "--min-lr",
    "1e-3",
    "--lr-decay-style",
    "constant",
    "--weight-decay",
    "0",
    "--clip-grad",
    "1.0",
    "--optimizer",
    "adam",
    "--accumulate-allreduce-grads-in-fp32",
    "--calculate-per-token-loss",
    "--perform-rl-step",
    "--grpo-prompts-per-step",
    "4",
    "--grpo-group-size",
    "2",
    "--grpo-iterations",
    "1",
    "--grpo-kl-beta",
    "0.01",
    "--langrl-env-config",
    "none",
    "--rl-skip-bos-token",
    "--mock-data",
    "--no-create-attention-mask-in-dataloader",
    "--eval-iters",
    "0",
    "--eval-interval",
    "1000",
    "--log-interval",
    "1",
    "--seed",
    "7",
    "--ckpt-format",
    "torch_dist",
    "--spec",
    "tests.helpers.megatron_lm_spec",
    "layer_spec",
]
"""Three updates of 8 rollouts each, as the examples of Megatron-LM's RL write them."""


@functools.cache
def checkout() -> Path | None:
    """The checkout, None where the variable is not set."""
    value = os.environ.get(CHECKOUT)
    return Path(value).resolve() if value else None


needs_checkout = pytest.mark.skipif(
    checkout() is None, reason=f"set {CHECKOUT} to a checkout of Megatron-LM (docs/megatron_lm.md)"
)
"""Marks tests that read the sources."""


@functools.cache
def why_not_run() -> str:
    """Why the checkout cannot be run by this Python; empty where it can."""
    path = checkout()
    if path is None:
        return f"set {CHECKOUT} to a checkout of Megatron-LM (docs/megatron_lm.md)"
    needed = re.search(r'requires-python = ">=(\d+)\.(\d+)', (path / "pyproject.toml").read_text(encoding="utf-8"))
    if needed and sys.version_info < tuple(map(int, needed.groups())):
        return f"{path} needs Python {'.'.join(needed.groups())}, this is {sys.version.split()[0]}"
    code = "import megatron_oisd.runtime.cpu as cpu; cpu.install(); import megatron.training, megatron.rl.rl_utils"
    code = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment(), text=True, capture_output=True, check=False
    )
    lacking = re.search(r"ModuleNotFoundError: (No module named '[\w.]+')", result.stderr)
    return f"{path} cannot be imported: {lacking.group(1)}" if lacking else ""


def environment() -> dict[str, str]:
    """Of a rank: this tree first on the path, no launcher's variables."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: value for name, value in os.environ.items() if name not in launcher}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    always = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return variables | always | {"PYTHONPATH": os.pathsep.join(paths)}


def run_script(world: int, arguments: list[str], log: Path, *, timeout_s: float = 300.0) -> tuple[int, str]:
    """Run ``megatron_lm_cpu.py`` on ``world`` ranks.

    Returns:
        (exit code, output); the output is in ``log`` too.
    """
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(world), str(ROOT / "tests" / "helpers" / "megatron_lm_cpu.py"), *arguments]
    mark = f"{os.getpid()}.{log}"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, env=environment() | {_MARK: mark}, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _kill_marked(mark)
            process.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")


_MARK = "OISD_TEST_RUN"


def _kill_marked(mark: str) -> None:
    """End what is left of a run: torchrun's ranks have sessions of their own, and Megatron's checkpoint writers outlive
    their rank."""
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def call(
    world: int, folder: Path, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0
) -> list[Any]:
    """Call a module-level function on ranks that have Megatron-LM; its results by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, argument in enumerate(arguments):
        paths.append(str(folder / f"argument{number}.pickle"))
        Path(paths[-1]).write_bytes(pickle.dumps(argument))
    name = f"{function.__module__}:{function.__qualname__}"
    code, log = run_script(world, ["call", str(folder), name, *paths], folder / "log", timeout_s=timeout_s)
    assert code == 0, log.partition('File "<frozen runpy>", line 198')[0][-6000:]  # without torchrun's own traceback
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer whose pad token is not token 0, which Megatron-LM takes for none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(150)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", pad_token="w2").save_pretrained(folder)
    return folder
