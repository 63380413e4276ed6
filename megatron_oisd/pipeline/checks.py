"""Refuses, at attach time, model options under which gradients would be silently wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError

# Option of TransformerConfig -> why it cannot be supported and what to do instead.
_REFUSED = {
    "multi_latent_attention": "attention shapes differ (MLA); use lambda_attn=0 once MLA is supported",
    "mtp_num_layers": "MTP layers call the output layer again; train without MTP heads",
    "num_moe_experts": "MoE layers are not proved yet; use a dense model",
    "fine_grained_activation_offloading": "it frees the activations the loss needs; switch it off",
    "distribute_saved_activations": "it splits saved activations in place; switch it off",
    "defer_embedding_wgrad_compute": "it pairs output-layer calls first in, first out; switch it off",
    "overlap_moe_expert_parallel_comm": "its schedule bypasses layer hooks; switch it off",
    "cpu_offloading": "it moves activations the loss needs; switch it off",
    "enable_cuda_graph": "hooks do not run in replayed graphs; switch CUDA graphs off",
    "external_cuda_graph": "hooks do not run in replayed graphs; switch CUDA graphs off",
    "apply_query_key_layer_scaling": "scores are scaled and rescaled within the attention; switch it off",
    "use_mup": "the lens does not apply its logit scaling; switch it off",
    "fp8": "recomputation under fp8 goes through another checkpoint function; train in bf16",
}


def check_model_config(model_config: Any, config: OISDConfig, model_chunks: Sequence[nn.Module]) -> None:
    """Raise :class:`OISDError` naming the first option that OISD cannot be exact under."""
    if not config.enabled:
        return
    for name, reason in _REFUSED.items():
        value = getattr(model_config, name, None)
        if value:
            raise OISDError(f"{name}={value!r} is not supported by OISD: {reason}")
    if getattr(model_config, "context_parallel_size", 1) > 1:
        raise OISDError(
            f"context_parallel_size={model_config.context_parallel_size} is not supported by OISD: use tensor and "
            "sequence parallelism for long sequences"
        )
    cuda_graphs = getattr(model_config, "cuda_graph_impl", "none")
    if cuda_graphs not in (None, "none"):
        raise OISDError(
            f"cuda_graph_impl={cuda_graphs!r} is not supported by OISD: hooks do not run in replayed graphs"
        )
    if config.lambda_attn > 0 and getattr(model_config, "window_size", None) is not None:
        raise OISDError(
            f"window_size={model_config.window_size} (sliding-window attention) is not supported by attention "
            "alignment: set lambda_attn=0"
        )
    if config.lambda_attn > 0 and getattr(model_config, "softmax_type", "vanilla") != "vanilla":
        raise OISDError(
            f"softmax_type={model_config.softmax_type!r} (attention sinks) is not supported by attention "
            "alignment: set lambda_attn=0"
        )
    if config.lambda_attn > 0 and model_config.num_query_groups < model_config.tensor_model_parallel_size:
        raise OISDError(
            f"num_query_groups={model_config.num_query_groups} is below tensor_model_parallel_size="
            f"{model_config.tensor_model_parallel_size}: use lambda_attn=0 or a smaller tensor-parallel size"
        )
    for chunk in model_chunks:
        if "FullyShardedDataParallel" in type(chunk).__name__ or "FSDP" in type(chunk).__name__:
            raise OISDError(
                f"{type(chunk).__name__} is not supported by OISD: the lens reads whole parameters outside forward; "
                "use DistributedDataParallel with the distributed optimizer"
            )
        ddp = getattr(chunk, "ddp_config", None)
        if ddp is None:
            continue
        if ddp.overlap_grad_reduce and config.head_gradient and config.lambda_think > 0:
            raise OISDError(
                "overlap_grad_reduce=True is not supported with head_gradient=True: the lens gradient of the head "
                "is added after the last backward; set overlap_grad_reduce=False or head_gradient=False"
            )
        if getattr(ddp, "overlap_param_gather", False):
            raise OISDError(
                "overlap_param_gather=True is not supported by OISD: the lens replica would be refreshed before the "
                "parameters are gathered; set overlap_param_gather=False"
            )
