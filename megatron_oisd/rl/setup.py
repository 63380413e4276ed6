"""Builds what a run trains: model chunks with weights, DDP, optimizer, rollout engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_oisd.convert.checkpoint import HF_DIRECTORY, load_model, model_state, read_arguments
from megatron_oisd.convert.hf_files import tokenizer_size
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.config import TrainConfig
from megatron_oisd.runtime.model import ModelArguments, build_model, have_transformer_engine, transformer_config


@dataclass
class Training:
    """A Megatron model with what trains it."""

    chunks: list[nn.Module]
    """DDP-wrapped model chunks, as the schedules and the optimizer are given them."""
    model_config: Any
    arguments: ModelArguments
    optimizer: Any
    scheduler: Any

    def optimizer_state(self, *, loading: bool, fully_reshardable: bool) -> dict[str, Any]:
        """Sharded state of optimizer and scheduler, to save or as the template to load into.

        Args:
            loading: make the template for a checkpoint that holds the optimizer.
            fully_reshardable: form of a distributed optimizer's state: loadable at any layout (its ranks gather it when
                it is saved), or at this TP and PP only.
        """
        if loading:
            self._start_state()
        state = model_state(self.chunks)
        model = state.get("model", state)
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable" if fully_reshardable else "dp_reshardable",
            "chained_optim_avoid_prefix": True,  # experts have an optimizer of their own, and their names suffice
        }
        return {
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint held."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        for _, inner in self._torch_adams():
            for moments in inner.state.values():
                # Loaded as one tensor for all parameters, each of which would then count it up.
                moments["step"] = moments["step"].clone()

    def _start_state(self) -> None:
        """Make up for what Megatron's distributed optimizer expects of fused Adams, which count steps by group.

        Torch's keeps a step beside the moments of each parameter, and no state at all before its first step: an
        optimizer without state cannot be described, and the loader looks for the steps among the saved tensors.
        """
        for wrapper, inner in self._torch_adams():
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            if hasattr(wrapper, "_set_main_param_and_optimizer_states"):
                _keep_steps(wrapper)

    def _torch_adams(self) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
        """Megatron's optimizers that stand on torch's own Adam, each with it."""
        for wrapper in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner = getattr(wrapper, "optimizer", None)
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
                yield wrapper, inner


def _keep_steps(optimizer: Any) -> None:
    """Let a distributed optimizer leave the steps alone, which its ``load_state_dict`` has set already."""
    original = type(optimizer)._set_main_param_and_optimizer_states

    @torch.no_grad()  # the fp32 parameters themselves may be written to
    def with_step(model_param: nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        original(optimizer, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    optimizer._set_main_param_and_optimizer_states = with_step


def build_training(config: TrainConfig) -> Training:
    """Build model, DDP, optimizer and scheduler on this rank's part of the layout, with ``config.load``'s weights."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module

    arguments = read_arguments(config.load)
    vocabulary = tokenizer_size(Path(config.load) / HF_DIRECTORY)
    if vocabulary is not None and vocabulary > arguments.vocab_size:
        raise OISDError(
            f"the tokenizer in {config.load}/{HF_DIRECTORY} has {vocabulary} tokens and the model "
            f"{arguments.vocab_size}: copy the tokenizer that the model was trained with there"
        )
    check_experts(config, arguments)
    if arguments.num_experts is not None and torch.distributed.get_rank() == 0:
        print(f"{arguments.num_experts} experts: trained without a load-balancing loss, whatever config.json says")
    further: dict[str, Any] = {}
    if config.recompute != "none":
        further["recompute_granularity"] = config.recompute
    if config.recompute == "full":
        further |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    if config.sequence_packing and torch.cuda.is_available() and not have_transformer_engine():
        raise OISDError(
            "--sequence-packing needs Transformer Engine on GPUs: install it, or leave the flag out (sequences of like "
            "length then share padded microbatches)"
        )
    # Microbatches of a token budget differ in shape: stages tell each other.
    further |= {"variable_seq_lengths": True} if config.variable_length else {}
    model_config = transformer_config(
        arguments, tensor_parallel=config.tp, pipeline_parallel=config.pp,
        sequence_parallel=config.sequence_parallel, expert_parallel=config.ep, expert_tensor_parallel=config.etp,
        dtype=dtype, finalize_model_grads_func=finalize_model_grads, **further,
    )  # fmt: skip
    bare = build_model(arguments, model_config, packed=config.sequence_packing)
    load_model(bare, config.load)
    if config.bf16:
        bare = [Float16Module(model_config, chunk) for chunk in bare]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    chunks: list[nn.Module] = [
        DistributedDataParallel(config=model_config, ddp_config=ddp_config, module=chunk) for chunk in bare
    ]
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        clip_grad=config.clip_grad,
        bf16=config.bf16,
        params_dtype=dtype,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron names every fused optimizer that is not installed
        optimizer = get_megatron_optimizer(optimizer_config, chunks)
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=config.lr, min_lr=config.lr, lr_warmup_steps=config.lr_warmup_steps,
        lr_decay_steps=max(config.lr_warmup_steps, 1) + 1, lr_decay_style="constant", start_wd=config.weight_decay,
        end_wd=config.weight_decay, wd_incr_steps=0, wd_incr_style="constant",
    )  # fmt: skip
    return Training(chunks, model_config, arguments, optimizer, scheduler)


def check_experts(config: TrainConfig, arguments: ModelArguments) -> None:
    """Raise :class:`OISDError` unless the layout suits the model's experts, if it has any."""
    if arguments.num_experts is None:
        for flag, value in (("--ep", config.ep if config.ep > 1 else None), ("--etp", config.etp)):
            if value is not None:
                raise OISDError(f"{flag} is {value}, and {arguments.architecture} has no experts: leave it out")
        return
    if arguments.num_experts % config.ep:
        raise OISDError(
            f"--ep is {config.ep}, which does not divide the model's {arguments.num_experts} experts: use an EP that "
            "does"
        )
    within, width = config.tp if config.etp is None else config.etp, arguments.moe_ffn_hidden_size or 0
    if within > config.tp:
        raise OISDError(f"--etp is {within} and --tp {config.tp}: expected at most that, other layouts are not proved")
    if width % within:
        raise OISDError(
            f"the tensor-parallel size within experts is {within}, which does not divide their width {width}: use an "
            "--etp that does"
        )
    if config.tp > 1 and not config.sequence_parallel:
        raise OISDError(f"--tp {config.tp} with experts needs --sequence-parallel: Megatron trains them no other way")
    per_stage = max(arguments.num_layers // config.pp, 1)
    for first in range(0, arguments.num_layers, per_stage):
        end = min(first + per_stage, arguments.num_layers)
        if not any(arguments.has_experts(layer) for layer in range(first, end)):
            raise OISDError(
                f"--pp {config.pp} makes a pipeline stage of layers {first + 1} to {end}, none of which has experts: "
                "Megatron cannot save the experts' optimizer then; use a smaller --pp"
            )


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer kept in a Megatron checkpoint directory."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(Path(directory) / HF_DIRECTORY, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise OISDError(
            f"the tokenizer in {directory}/{HF_DIRECTORY} cannot be loaded ({type(error).__name__}): copy the HF "
            "model's tokenizer files there"
        ) from error
