"""Process start and end: torch.distributed, Megatron's model-parallel groups, the seeds."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_oisd.errors import OISDError
from megatron_oisd.runtime import cpu


def initialize(
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int | None = None,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
    seed: int = 1234,
    timeout_s: float = 600.0,
) -> None:
    """Join the process group that torchrun describes and build Megatron's parallel groups.

    Without torchrun's environment a group of one process is made, so that every command also runs alone. The backend
    is NCCL where CUDA is available and gloo otherwise; on CPU the runtime shim is installed first.

    Args:
        tensor_parallel: tensor-model-parallel size (TP).
        pipeline_parallel: pipeline-model-parallel size (PP).
        virtual_pipeline: model chunks per pipeline stage (VPP), None for the plain 1F1B schedule.
        expert_parallel: ranks that share out the experts of a layer (EP); taken from TP x DP, not beside it.
        expert_tensor_parallel: tensor-parallel size within an expert (ETP), None for TP.
        seed: seed of Python-independent RNGs: torch's and Megatron's model-parallel trackers.
        timeout_s: seconds after which a collective that lacks a rank fails instead of waiting on.

    Raises:
        OISDError: the world size is not a multiple of TP x PP, or of ETP x EP x PP.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_world_size(world_size, tensor_parallel, pipeline_parallel, expert_parallel, expert_tensor_parallel)
    on_cpu = cpu.install()
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ:
            store = dist.HashStore()
            dist.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=0, world_size=1)
        else:
            dist.init_process_group("gloo" if on_cpu else "nccl", timeout=timedelta(seconds=timeout_s))

    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=expert_tensor_parallel,
        distributed_timeout_minutes=timeout_s / 60,
    )
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators and Megatron's tensor-parallel trackers.

    A run that calls this at every step with a seed made of the step's number has no random state to save: a resumed
    run is in the same state, on any layout.
    """
    import random

    import numpy as np
    from megatron.core import tensor_parallel as megatron_tp

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    megatron_tp.model_parallel_cuda_manual_seed(seed)


def check_world_size(
    world_size: int,
    tensor_parallel: int,
    pipeline_parallel: int,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
) -> None:
    """Raise :class:`OISDError` unless ``world_size`` is a positive multiple of TP x PP and of ETP x EP x PP."""
    within = tensor_parallel if expert_tensor_parallel is None else expert_tensor_parallel
    sizes = {"--tp": tensor_parallel, "--pp": pipeline_parallel, "--ep": expert_parallel, "--etp": within}
    for name, value in sizes.items():
        if value < 1:
            raise OISDError(f"{name} is {value}: expected an integer of at least 1")
    model_size = tensor_parallel * pipeline_parallel
    if world_size % model_size:
        raise OISDError(
            f"the world has {world_size} ranks, which TP {tensor_parallel} x PP {pipeline_parallel} = {model_size} "
            f"does not divide: start a multiple of {model_size} ranks (torchrun --nproc-per-node) or change --tp / --pp"
        )
    # Of the same ranks: the experts' layout is another cut through the world than that of the rest of the model.
    expert_size = within * expert_parallel * pipeline_parallel
    if world_size % expert_size:
        raise OISDError(
            f"the world has {world_size} ranks, which for the experts ETP {within} x EP {expert_parallel} x PP "
            f"{pipeline_parallel} = {expert_size} does not divide: start a multiple of {expert_size} ranks or change "
            "--ep / --etp"
        )


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def shutdown() -> None:
    """Leave the process group; safe to call twice."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's global rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
