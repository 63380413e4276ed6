"""Imported once by the fork server, so that ranks start in milliseconds instead of importing Megatron each."""
# ruff: noqa: E402, F401

import os

os.environ["OMP_NUM_THREADS"] = "1"

import warnings

import torch

torch.set_num_threads(1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron names every fused kernel that is not installed
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel
    import transformers.models.qwen3.modeling_qwen3

import megatron_oisd.rl.policy
