"""One rank of a Megatron-LM checkout on a CPU, as its own process; started by ``tests/helpers/megatron_lm.py``.

    megatron_lm_cpu.py plain ARGUMENTS            train_rl.py as it is
    megatron_lm_cpu.py oisd ARGUMENTS             examples/megatron_lm/train_rl_oisd.py
    megatron_lm_cpu.py call OUT MODULE:FUNCTION PICKLE ...
                                                  function(*pickled arguments); the result goes to OUT/RANK.pt

What is replaced of Megatron-LM: its calls of CUDA (the runtime shim and the few below), the compilation of kernels,
and the generation of rollouts, which needs a GPU. Everything else runs as it is.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Make Megatron-LM run here."""
    import torch

    import tests.helpers  # noqa: F401 - before the checkout, which has a package of that name, comes first on the path
    from megatron_oisd.integrations.megatron_lm import find_checkout
    from megatron_oisd.runtime import cpu

    torch.set_num_threads(1)
    find_checkout()
    cpu.install()
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.cuda.get_device_properties = lambda *args: SimpleNamespace(major=9, minor=0)

    from megatron.training import initialize, training

    initialize._compile_dependencies = lambda: None
    training.set_jit_fusion_options = lambda *args, **kwargs: None
    original = training.initialize_megatron
    training.initialize_megatron = lambda *args, **kwargs: original(*args, **{**kwargs, "allow_no_cuda": True})

    from megatron.rl import rl_utils

    with_ledger = "request_ledger" in inspect.signature(rl_utils.prepare_data_for_update).parameters

    def rollouts(model: Any, inference_model: Any, optimizer: Any, num_prompts: int, samples: int) -> Any:
        made = make_rollouts(num_prompts, samples)
        return (made, {}) if with_ledger else made

    rl_utils.get_environment_rollouts = rollouts


def make_rollouts(num_prompts: int, samples: int) -> list[Any]:
    """Groups of rollouts in the place of the inference engine's; the same on every rank and layout."""
    import torch
    from megatron.rl.agent.api import TokenRollout
    from megatron.training import get_args, get_tokenizer

    generator = torch.Generator().manual_seed(100 + get_args().curr_iteration)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def rollout(prompt: int) -> Any:
        before, after = number(3, 6), number(3, 12)
        tokens = [number(4, 140) for _ in range(before + after)] + [get_tokenizer().eod]
        log_probs = (-5 + 0.1 * torch.randn(after + 1, generator=generator)).tolist()
        return TokenRollout(
            trajectory=[tokens], reward=float(number(0, 100)) / 100, logprobs=[log_probs], env_id="made up",
            generation_mask=[[False] * before + [True] * (after + 1)], problem_id=str(prompt),
        )  # fmt: skip

    return [[rollout(prompt) for _ in range(samples)] for prompt in range(num_prompts)]


def main(mode: str, arguments: list[str]) -> int:
    """Run what the command line asks for."""
    prepare()
    if mode == "call":
        out, name, *pickled = arguments
        module, _, function = name.partition(":")
        given = [pickle.loads(Path(path).read_bytes()) for path in pickled]
        result = getattr(importlib.import_module(module), function)(*given)
        import torch

        # Not by pickle, into which newer releases put a function of their own for tensors.
        torch.save(result, Path(out) / f"{os.environ['RANK']}.pt")
        return 0
    if mode == "plain":
        script = str(Path(os.environ["MEGATRON_LM_PATH"]) / "train_rl.py")
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return 0
    launcher = runpy.run_path(str(ROOT / "examples" / "megatron_lm" / "train_rl_oisd.py"))
    return launcher["main"](arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
