"""Builds Megatron-Core GPT models: one description, any parallel layout, with or without Transformer Engine.

The description (:class:`ModelArguments`) uses Megatron's argument names. :mod:`megatron_oisd.convert.families` makes it
from an HF ``config.json``.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_oisd.errors import OISDError
from megatron_oisd.runtime import cpu


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The shape of a decoder, in Megatron-LM's argument names."""

    architecture: str = "Qwen3ForCausalLM"
    """HF class name, the key of the converter's family table."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    """True vocabulary size, without padding rows."""
    max_position_embeddings: int
    rotary_base: float
    layernorm_epsilon: float
    qk_layernorm: bool
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = False
    use_rope_scaling: bool = False
    """Llama 3's scaling of the rotary frequencies, for 8192 original positions."""
    rope_scaling_factor: float = 8.0
    window_size: tuple[int, int] | None = None
    """Keys before and after itself that a query sees; None for all before it."""
    window_attn_skip_freq: tuple[int, ...] | None = None
    """For each layer 1 with the window and 0 without; None: ``window_size`` holds in all layers."""
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int = 2
    moe_router_pre_softmax: bool = False
    """Whether the weights of the chosen experts are those of the softmax over all of them, not normalised again."""
    moe_layer_freq: int | tuple[int, ...] = 1
    """1 where all layers have experts, or for each layer 1 with experts and 0 with a dense MLP."""

    def has_experts(self, layer: int) -> bool:
        """Whether the 0-based ``layer`` is a mixture of experts."""
        if self.num_experts is None:
            return False
        if isinstance(self.moe_layer_freq, int):
            return layer % self.moe_layer_freq == 0
        return bool(self.moe_layer_freq[layer])

    def megatron_args(self) -> dict[str, Any]:
        """The fields as Megatron-LM's ``args`` hold them: patterns over the layers are lists."""
        fields = dataclasses.asdict(self)
        patterns = ("window_attn_skip_freq", "moe_layer_freq")
        return fields | {name: list(fields[name]) for name in patterns if isinstance(fields[name], tuple)}

    def padded_vocab_size(self, tensor_parallel: int, divisible_by: int = 128) -> int:
        """``vocab_size`` rounded up to a multiple of ``divisible_by * tensor_parallel``, as Megatron-LM pads it."""
        multiple = divisible_by * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


class SequenceParallelRMSNorm(nn.RMSNorm):
    """RMSNorm for Megatron's local spec that also serves sequence parallelism.

    Megatron wraps torch's norm but refuses it there; all it needs is the ``sequence_parallel`` mark on the weight, by
    which Megatron sums the weight's gradient over the tensor-parallel ranks, each of which sees its own tokens.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be used here: importable (its CPU build is not) and with a CUDA device."""
    if cpu.is_needed():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def transformer_config(
    arguments: ModelArguments,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int | None = None,
    sequence_parallel: bool = False,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Any:
    """Make Megatron's ``TransformerConfig``.

    Args:
        arguments: the model's shape.
        tensor_parallel: TP size.
        pipeline_parallel: PP size.
        virtual_pipeline: chunks per stage, or None.
        sequence_parallel: shard activations outside the tensor-parallel regions along the sequence; Megatron trains
            experts under tensor parallelism only so.
        expert_parallel: EP size, over which the experts are shared out.
        expert_tensor_parallel: TP size within an expert; None for that of the rest of the model.
        dtype: parameter dtype; also the dtype of pipeline messages.
        **overrides: any further ``TransformerConfig`` field, e.g. ``recompute_granularity="full"``.
    """
    from megatron.core.transformer import TransformerConfig

    on_cpu = cpu.is_needed()
    fields: dict[str, Any] = {
        "num_layers": arguments.num_layers,
        "hidden_size": arguments.hidden_size,
        "ffn_hidden_size": arguments.ffn_hidden_size,
        "num_attention_heads": arguments.num_attention_heads,
        "num_query_groups": arguments.num_query_groups,
        "kv_channels": arguments.kv_channels,
        "layernorm_epsilon": arguments.layernorm_epsilon,
        "qk_layernorm": arguments.qk_layernorm,
        "add_qkv_bias": arguments.add_qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "virtual_pipeline_model_parallel_size": virtual_pipeline,
        "sequence_parallel": sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu_initialization": on_cpu,
        "batch_p2p_comm": not on_cpu,
        "deallocate_pipeline_outputs": True,
        "calculate_per_token_loss": True,
        # Fused kernels exist on CUDA only; without Apex the accumulation fusion does not exist at all.
        "masked_softmax_fusion": False,
        "bias_activation_fusion": not on_cpu,
        "bias_dropout_fusion": not on_cpu,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    if virtual_pipeline:
        # Non-overlapped interleaving mixes up messages on gloo, with or without this package.
        fields["overlap_p2p_comm"] = True
        fields["batch_p2p_comm"] = False
        # The overlapped schedule frees an output right after posting its send. CUDA streams order that; gloo reads the
        # freed memory (seen as rare NaNs in plain Megatron).
        fields["deallocate_pipeline_outputs"] = not on_cpu
    if arguments.window_size is not None:
        fields["window_size"] = arguments.window_size
        if arguments.window_attn_skip_freq is not None:
            fields["window_attn_skip_freq"] = list(arguments.window_attn_skip_freq)
    if arguments.num_experts is not None:
        fields |= _moe_fields(arguments, expert_parallel, expert_tensor_parallel)
    if overrides.get("variable_seq_lengths"):
        # Megatron asks this of dense models too, whose dispatcher is never used.
        fields["moe_token_dispatcher_type"] = "alltoall"
    known = {item.name for item in dataclasses.fields(TransformerConfig)}
    fields = {name: value for name, value in fields.items() if name in known or name not in _OPTIONAL} | overrides
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise OISDError(
            f"TransformerConfig of the installed Megatron-Core has no {', '.join(unknown)}: leave it out, or install a "
            "release that has it"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_accumulation_fusion.*")
        return TransformerConfig(**fields)


# Releases without these do what we set them to.
_OPTIONAL = ("moe_router_dtype", "moe_permute_fusion")


def _moe_fields(arguments: ModelArguments, expert_parallel: int, expert_tensor_parallel: int | None) -> dict[str, Any]:
    pattern = arguments.moe_layer_freq
    return {
        "num_moe_experts": arguments.num_experts,
        "moe_ffn_hidden_size": arguments.moe_ffn_hidden_size,
        "moe_router_topk": arguments.moe_router_topk,
        "moe_router_pre_softmax": arguments.moe_router_pre_softmax,
        "moe_layer_freq": pattern if isinstance(pattern, int) else list(pattern),
        "expert_model_parallel_size": expert_parallel,
        "expert_tensor_parallel_size": expert_tensor_parallel,
        # No loss of its own: what trains the router is up to the caller's overrides.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": have_transformer_engine(),
        "moe_permute_fusion": False,
    }


def taken(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of ``options`` that ``function`` takes: older releases of Megatron-Core do not know all of them."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


@contextmanager
def virtual_stage(vp_stage: int | None) -> Iterator[None]:
    """Surrounds what builds a virtual chunk: older releases ask the parallel state for its number.

    Newer ones are given it (:func:`taken`) and leave the parallel state alone.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    if vp_stage is None or taken(GPTModel, vp_stage=vp_stage):
        yield
        return
    before = parallel_state.get_virtual_pipeline_model_parallel_rank()
    parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_rank(before)


def pipeline_ends(vp_stage: int | None) -> tuple[bool, bool]:
    """Whether this rank's chunk ``vp_stage`` is the pipeline's first and whether it is its last.

    Called inside :func:`virtual_stage`.
    """
    from megatron.core import parallel_state

    ends = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    where = {} if vp_stage is None else {"ignore_virtual": False, **taken(ends[0], vp_stage=vp_stage)}
    return ends[0](**where), ends[1](**where)


def build_model_chunk(
    arguments: ModelArguments,
    config: Any,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    pg_collection: Any = None,
    packed: bool = False,
) -> nn.Module:
    """Build one pipeline stage (or one virtual chunk of it) as a ``GPTModel``.

    ``packed`` is for packed sequences: without Transformer Engine their attention is :mod:`.attention`'s.
    """
    from megatron.core.models.gpt import GPTModel

    spec = _layers_spec(arguments, config, vp_stage, packed=packed)
    scaling = taken(GPTModel, rope_scaling_factor=arguments.rope_scaling_factor)
    if arguments.use_rope_scaling and not scaling and arguments.rope_scaling_factor != 8.0:
        raise OISDError(
            f"rope_scaling_factor is {arguments.rope_scaling_factor}: the installed Megatron-Core scales by 8 only; "
            "install a release whose GPTModel takes rope_scaling_factor"
        )
    chunk: Any = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=arguments.padded_vocab_size(config.tensor_model_parallel_size),
        max_sequence_length=arguments.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=arguments.rotary_base,
        rope_scaling=arguments.use_rope_scaling,
        **scaling,
        **taken(GPTModel, vp_stage=vp_stage, pg_collection=pg_collection),
    )
    for layer in chunk.decoder.layers:
        if hasattr(layer.mlp, "router"):
            # In checkpoints the norm before the MLP has the name that Transformer Engine's layers give it: it is fused
            # with a dense MLP only, and Megatron's local spec forgets that.
            layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            # Megatron treats experts as such under expert parallelism only. They always are: at EP 1 their gradients
            # would miss ranks where their TP is not that of the rest, and the optimizer would have another form.
            for parameter in layer.mlp.experts.parameters():
                parameter.allreduce = False
    return chunk


def _layers_spec(arguments: ModelArguments, config: Any, vp_stage: int | None, *, packed: bool) -> Any:
    """Megatron's modules for the layers of this chunk."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    if have_transformer_engine():
        if arguments.num_experts is None:
            return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arguments.qk_layernorm)
        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, **taken(get_gpt_decoder_block_spec, vp_stage=vp_stage)
        )
    if arguments.num_experts is None:
        norm = taken(get_gpt_layer_local_spec, normalization="RMSNorm")
        layer = get_gpt_layer_local_spec(qk_layernorm=arguments.qk_layernorm, **norm)
        number = get_num_layers_to_build(config, **taken(get_num_layers_to_build, vp_stage=vp_stage))
        layers = [layer] * number
    else:
        extra = taken(get_gpt_decoder_block_spec, normalization="RMSNorm", vp_stage=vp_stage)
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, **extra)
        layers = block.layer_specs
    layers = copy.deepcopy(layers)  # layers that are alike stay one object
    for layer in layers:
        parts, attention = layer.submodules, layer.submodules.self_attention.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = SequenceParallelRMSNorm
        if arguments.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
        if packed:
            from megatron_oisd.runtime.attention import UnfusedAttention

            attention.core_attention = UnfusedAttention
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=SequenceParallelRMSNorm)


def build_model(arguments: ModelArguments, config: Any, *, packed: bool = False) -> list[nn.Module]:
    """Build this rank's model chunks from Megatron's initialised parallel state: one, or one per virtual stage.

    ``packed`` as in :func:`build_model_chunk`.
    """
    stages: list[int | None] = (
        [None]
        if config.virtual_pipeline_model_parallel_size is None
        else list(range(config.virtual_pipeline_model_parallel_size))
    )
    chunks = []
    for vp_stage in stages:
        with virtual_stage(vp_stage):
            first, last = pipeline_ends(vp_stage)
            chunk = build_model_chunk(
                arguments, config, pre_process=first, post_process=last, vp_stage=vp_stage, packed=packed
            )
        chunks.append(chunk)
    return chunks
