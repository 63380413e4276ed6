"""Refuses, at attach time, model options under which gradients would be silently wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.attention import common_sliding_window
from megatron_oisd.losses.numerics import Group

# Option of TransformerConfig -> why it cannot be supported and what to do instead.
_REFUSED = {
    "fine_grained_activation_offloading": "it frees the activations the loss needs; switch it off",
    "distribute_saved_activations": "it splits saved activations in place; switch it off",
    "defer_embedding_wgrad_compute": "it pairs output-layer calls first in, first out; switch it off",
    "overlap_moe_expert_parallel_comm": "its schedule bypasses layer hooks; switch it off",
    "cpu_offloading": "it moves activations the loss needs; switch it off",
    "enable_cuda_graph": "hooks do not run in replayed graphs; switch CUDA graphs off",
    "external_cuda_graph": "hooks do not run in replayed graphs; switch CUDA graphs off",
    "enable_mhc_connections": "hidden states hold several streams before they are contracted; switch it off",
    "enable_hyper_connections": "hidden states hold several streams before they are contracted; switch it off",
    "fp32_residual_connection": "hidden states have another type than the unembedding; switch it off",
    "use_mup": "the lens does not apply its logit scaling; switch it off",
    "fp8": "recomputation under fp8 goes through another checkpoint function; train in bf16",
    "fp4": "recomputation under fp4 goes through another checkpoint function; train in bf16",
}
# Likewise, where attention is aligned: with lambda_attn=0 they are supported.
_REFUSED_WITH_ATTENTION = {
    "apply_query_key_layer_scaling": "scores are scaled and rescaled within the attention; switch it off",
    "experimental_attention_variant": "its core attention is given other tensors; set lambda_attn=0",
}


def check_model(
    model_config: Any, config: OISDConfig, model_chunks: Sequence[nn.Module], models: Sequence[Any], *, cp_size: int
) -> None:
    """Raise :class:`OISDError` naming the first option that OISD cannot be exact under.

    Args:
        model_config: Megatron's configuration.
        config: OISD's.
        model_chunks: the chunks as the schedule is given them.
        models: the decoder models inside.
        cp_size: ranks of the context-parallel group that OISD was given.
    """
    if not config.enabled:
        return
    refused = _REFUSED | (_REFUSED_WITH_ATTENTION if config.lambda_attn > 0 else {})
    for name, reason in refused.items():
        value = getattr(model_config, name, None)
        if value:
            raise OISDError(f"{name}={value!r} is not supported by OISD: {reason}")
    weight_shards = getattr(model_config, "gtp_weight_remat_size", 1)
    if weight_shards > 1:
        raise OISDError(
            f"gtp_weight_remat_size={weight_shards} is not supported by OISD: the lens reads whole tensor-parallel "
            "shards of the unembedding; leave tensor_parallel_num_weight_shards unset"
        )
    cuda_graphs = getattr(model_config, "cuda_graph_impl", "none")
    if cuda_graphs not in (None, "none"):
        raise OISDError(
            f"cuda_graph_impl={cuda_graphs!r} is not supported by OISD: hooks do not run in replayed graphs"
        )
    if config.lambda_attn > 0 and getattr(model_config, "softmax_type", "vanilla") != "vanilla":
        raise OISDError(
            f"softmax_type={model_config.softmax_type!r} (attention sinks) is not supported by attention "
            "alignment: set lambda_attn=0"
        )
    _check_context_parallel(getattr(model_config, "context_parallel_size", 1), cp_size)
    for chunk in model_chunks:
        if "FullyShardedDataParallel" in type(chunk).__name__ or "FSDP" in type(chunk).__name__:
            raise OISDError(
                f"{type(chunk).__name__} is not supported by OISD: the lens reads whole parameters outside forward; "
                "use DistributedDataParallel with the distributed optimizer"
            )
    for model in models:
        _check_layers(model, config)


def check_agreement(settings: dict[str, Any], groups: Sequence[Group]) -> None:
    """Raise :class:`OISDError` on every rank where any two of them have different settings.

    Other settings mean other messages, hence a hang, or the same messages with another meaning.

    Args:
        settings: this rank's, by name.
        groups: process groups that together join all ranks of the model; one small object collective over each.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = ""
    for group in groups:
        if group is None or group.size() == 1:
            continue
        gathered: list[Any] = [None] * group.size()
        dist.all_gather_object(gathered, (rank, settings, found), group=group)
        # What one group found travels on with its ranks, so that all of them raise and none waits for the others.
        messages = [message for _, _, message in gathered if message]
        first, expected, _ = gathered[0]
        messages += [
            f"{name} is {value!r} on rank {first} and {theirs[name]!r} on rank {other}: every rank must construct OISD "
            "with the same arguments; check the flags and files of both ranks' machines"
            for other, theirs, _ in gathered
            for name, value in expected.items()
            if theirs[name] != value
        ]
        found = messages[0] if messages else found
    if found:
        raise OISDError(found)


def _check_context_parallel(size: int, given: int) -> None:
    if size != given:
        raise OISDError(
            f"context_parallel_size={size} is not supported by OISD without its group: pass OISD(..., cp_group=) of "
            f"{size} ranks (it has {given})"
        )


def _check_layers(model: Any, config: OISDConfig) -> None:
    """What each layer must have, whatever its spec."""
    for layer in model.decoder.layers:
        attention = getattr(layer, "self_attention", None)
        if layer.layer_number in config.layers and config.lambda_attn > 0 and not hasattr(attention, "core_attention"):
            raise OISDError(
                f"student layer {layer.layer_number} ({type(layer).__name__}) has no attention to align: choose a "
                "layer with attention or set lambda_attn=0"
            )


def shared_sliding_window(model_config: Any, layers: Sequence[int]) -> tuple[int, int] | None:
    """The attention window that all of ``layers`` (counted from 1) have in common; None: no limit.

    Student and teacher are compared on one key set, which each of them must be able to see.
    """
    size = getattr(model_config, "window_size", None)
    if size is None:
        return None
    skip = getattr(model_config, "window_attn_skip_freq", None)
    return common_sliding_window(*(tuple(size) if _is_windowed(skip, layer) else None for layer in layers))


def _is_windowed(skip: int | list[int] | None, layer: int) -> bool:
    """Megatron's rule: every ``skip``-th layer sees everything, or a list says it for each layer."""
    if skip is None:
        return True
    if isinstance(skip, int):
        return layer % skip != 0
    return bool(skip[layer - 1])
