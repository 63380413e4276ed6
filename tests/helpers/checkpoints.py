"""Tiny HF checkpoints made with transformers' own classes, and what the converter's tests do on every rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 300  # not a multiple of 128: TP 1 pads to 384, TP 2 to 512, TP 4 to 512
TOKENS = 290  # fewer than rows, as in real models

FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "Qwen2": {"head_dim": 16},  # no key of this family: hidden_size / num_attention_heads
    "Llama": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 20000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "Mistral": {"sliding_window": 5},
    "Qwen3Moe": {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
}  # fmt: skip
"""What a family's tiny model has beside the common sizes: the feature that the family is there for."""


def make_hf_checkpoint(
    directory: Path,
    *,
    tied: bool,
    family: str = "Qwen3",
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    shard_size: str = "5GB",
    split_experts: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random model whose layers, heads, norms and tokens all differ; the same weights at every call."""
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
        "tie_word_embeddings": tied, "rope_theta": 20000.0,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**fields | FAMILY_FIELDS.get(family, {}) | overrides)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)
    how = {} if split_experts else {"save_original_format": False}
    model.save_pretrained(directory, max_shard_size=shard_size, **how)
    if tokenizer:
        make_tokenizer(TOKENS).save_pretrained(directory)
    return directory


def make_tokenizer(size: int) -> Any:
    """Word-level tokenizer of ``size`` tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", pad_token="w0")


def build_chunks(
    arguments: Any,
    *,
    tp: int,
    pp: int,
    vpp: int | None = None,
    ep: int = 1,
    expert_tp: int | None = None,
    **overrides: Any,
) -> list[nn.Module]:
    """Join the group and build this rank's chunks, with NaN in every parameter."""
    from megatron_oisd.runtime.model import build_model, transformer_config

    join(tp=tp, pp=pp, vpp=vpp, ep=ep, expert_tp=expert_tp)
    if tp > 1 and ep > 1:
        overrides.setdefault("sequence_parallel", True)  # as Megatron trains; 0.15 breaks down without
    config = transformer_config(
        arguments, tensor_parallel=tp, pipeline_parallel=pp, virtual_pipeline=vpp, expert_parallel=ep,
        expert_tensor_parallel=expert_tp, **overrides,
    )  # fmt: skip
    chunks = build_model(arguments, config)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    return chunks


def join(*, tp: int, pp: int, vpp: int | None, ep: int, expert_tp: int | None) -> None:
    """Start torch.distributed, and Megatron's groups anew."""
    from megatron.core import parallel_state

    from megatron_oisd.runtime import distributed

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    distributed.initialize(
        tensor_parallel=tp, pipeline_parallel=pp, virtual_pipeline=vpp, expert_parallel=ep,
        expert_tensor_parallel=expert_tp,
    )  # fmt: skip


@torch.no_grad()
def logit_error(directory: Path, token_ids: Tensor, *, change: dict[str, Any] | None = None, **layout: Any) -> float:
    """Largest difference between HF's and Megatron's logits, relative to the largest logit, on every rank.

    Args:
        directory: an HF checkpoint.
        token_ids: ``[b, s]``.
        change: fields of the model's arguments that are made wrong.
        **layout: ``tp``, ``ep``, ``expert_tp`` of Megatron's model.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from transformers import AutoModelForCausalLM

    from megatron_oisd.convert.families import arguments_from_hf_config
    from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config
    from megatron_oisd.convert.weights import load_hf_weights

    arguments = dataclasses.replace(arguments_from_hf_config(read_hf_config(directory)), **change or {})
    (model,) = build_chunks(arguments, **{"tp": 1, "pp": 1, **layout})
    load_hf_weights([model], arguments, dict(SafetensorsDirectory(directory)))
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
    mine = model.eval()(token_ids, positions, None)
    shards = [torch.empty_like(mine) for _ in range(layout.get("tp", 1))]
    dist.all_gather(shards, mine.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    ours = torch.cat(shards, dim=-1)[..., : arguments.vocab_size]
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    theirs = hf(token_ids).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def rename_as_transformer_engine(chunk: Any) -> None:
    """Give the parameters of a live model the places that they have in Transformer Engine's modules."""
    for layer in chunk.decoder.layers:
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.input_layernorm = nn.Identity()
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
            layer.pre_mlp_layernorm = nn.Identity()
            continue
        layer.mlp.experts = nn.Module()
        for name in ("linear_fc1", "linear_fc2"):
            grouped = nn.Module()
            for number, expert in enumerate(experts.local_experts):
                setattr(grouped, f"weight{number}", getattr(expert, name).weight)
            setattr(layer.mlp.experts, name, grouped)


def export(chunks: list[nn.Module], arguments: Any, **kwargs: Any) -> list[tuple[str, Tensor]]:
    """All that the collective export yields on this rank, in order."""
    from megatron.core import parallel_state

    from megatron_oisd.convert.weights import export_hf_weights

    groups = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "pp_group": parallel_state.get_pipeline_model_parallel_group(),
    }
    return list(export_hf_weights(chunks, arguments, **groups, **kwargs))


def differences(exported: list[tuple[str, Tensor]], expected: dict[str, Tensor]) -> list[str]:
    """Names that are missing, superfluous, repeated or not bit-identical; empty when all is well."""
    names = [name for name, _ in exported]
    wrong = [f"{name}: repeated" for name in {n for n in names if names.count(n) > 1}]
    wrong += [f"{name}: missing" for name in expected.keys() - set(names)]
    for name, tensor in exported:
        if name not in expected:
            wrong.append(f"{name}: superfluous")
        elif tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name]):
            wrong.append(f"{name}: differs")
    return wrong
