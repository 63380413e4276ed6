"""Tiny HF checkpoints made with transformers' own classes, and what the converter's tests do on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 300  # not a multiple of 128: TP 1 pads to 384, TP 2 to 512, TP 4 to 512
TOKENS = 290  # fewer than rows, as in real models


def make_hf_checkpoint(
    directory: Path,
    *,
    tied: bool,
    family: str = "Qwen3",
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random model whose layers, heads, norms and tokens all differ; the same weights at every call."""
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
        "tie_word_embeddings": tied, "rope_theta": 20000.0,
    }  # fmt: skip
    if family == "Qwen2":
        fields["head_dim"] = 16  # Qwen2 has no such key: hidden_size / num_attention_heads
    config = getattr(transformers, f"{family}Config")(**fields | overrides)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise)
    model.save_pretrained(directory, max_shard_size=shard_size)
    if tokenizer:
        make_tokenizer(TOKENS).save_pretrained(directory)
    return directory


def make_tokenizer(size: int) -> Any:
    """Word-level tokenizer of ``size`` tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", pad_token="w0")


def build_chunks(arguments: Any, *, tp: int, pp: int, vpp: int | None = None, **overrides: Any) -> list[nn.Module]:
    """Join the group and build this rank's chunks, with NaN in every parameter."""
    from megatron_oisd.runtime import distributed
    from megatron_oisd.runtime.model import build_model, transformer_config

    distributed.initialize(tensor_parallel=tp, pipeline_parallel=pp, virtual_pipeline=vpp)
    config = transformer_config(arguments, tensor_parallel=tp, pipeline_parallel=pp, virtual_pipeline=vpp, **overrides)
    chunks = build_model(arguments, config)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    return chunks


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
