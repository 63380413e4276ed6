"""The rollout engine that a configuration asks for."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_oisd.convert.checkpoint import HF_DIRECTORY
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.config import TrainConfig
from megatron_oisd.rl.rollout.base import ModelLimits, RolloutEngine, SamplingParams
from megatron_oisd.rl.rollout.weight_names import ExpectedWeights


def sampling_params(config: TrainConfig) -> SamplingParams:
    """How a run's rollouts are drawn."""
    return SamplingParams(max_new_tokens=config.max_response_tokens, temperature=config.temperature, top_p=config.top_p)


def build_engine(config: TrainConfig, tokenizer: Any) -> RolloutEngine:
    """This rank's engine, without weights of its own: the trainer streams them in. A collective over all ranks.

    Raises:
        OISDError: the engine's package is missing, or it cannot start.
    """
    from transformers import AutoConfig

    directory = Path(config.load) / HF_DIRECTORY
    if tokenizer.eos_token_id is None:
        raise OISDError(f"the tokenizer in {directory} has no eos_token: responses could not end")
    eos = int(tokenizer.eos_token_id)
    hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if config.rollout_engine == "transformers":
        return _transformers_engine(hf_config, dtype, eos=eos, pad=tokenizer.pad_token_id)
    if config.rollout_engine == "vllm_server":
        from megatron_oisd.rl.rollout.vllm_server import ServerLimits, VLLMServerEngine

        urls = config.server_urls
        name = [secrets.token_hex(4)]
        dist.broadcast_object_list(name, src=0)
        return VLLMServerEngine(
            urls[rank % len(urls)], run=name[0], expected=ExpectedWeights.from_hf_config(hf_config),
            limits=ModelLimits.from_hf_config(hf_config), eos_token_ids=[eos], pushes=rank < len(urls),
            server=ServerLimits(timeout_s=config.rollout_timeout_s, retries=config.rollout_retries),
            weights_host=config.rollout_weights_host,
        )  # fmt: skip
    from megatron_oisd.rl.rollout.vllm_engine import VLLMEngine

    multiprocess = config.rollout_engine == "vllm"
    if not multiprocess and world_size > 1:
        raise OISDError(
            f"--rollout-engine vllm_in_process with {world_size} ranks: vLLM engines inside the ranks of one job wait "
            "for each other; use --rollout-engine vllm"
        )
    return VLLMEngine(
        directory, eos_token_ids=[eos], sampling=sampling_params(config), dtype=dtype, multiprocess=multiprocess,
        load_weights=False, memory_fraction=config.rollout_gpu_memory_utilization, seed=config.seed,
        sleep_mode=config.rollout_sleep, timeout_s=config.rollout_timeout_s,
    )  # fmt: skip


def _transformers_engine(hf_config: Any, dtype: torch.dtype, *, eos: int, pad: int | None) -> RolloutEngine:
    from transformers import AutoModelForCausalLM

    from megatron_oisd.rl.rollout.transformers_engine import TransformersEngine

    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=False)
    if torch.cuda.is_available():
        model = model.to(torch.cuda.current_device())
    return TransformersEngine(model, eos_token_id=eos, pad_token_id=eos if pad is None else pad)
