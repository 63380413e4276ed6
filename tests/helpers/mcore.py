"""A tiny model on any Megatron-Core layout, its weights the same on all of them.

The model is Megatron's own ``GPTModel`` with weights that depend on their global names alone, so that every layout
holds the same model without converters: weights go in and gradients come out through ``sharded_state_dict``, which
knows what part of which tensor a rank has. (That Megatron's model is the right model is shown by ``layout.py``, against
HF's.) ``mcore_run.py`` trains it, ``mcore_reference.py`` says what its gradients must be.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig

VOCAB = 150
# Options that older releases do not have; what they do without them is the same on every layout.
LATER = ("rope_type", "moe_router_dtype", "moe_permute_fusion")
PADDED = 512  # the same on every layout, so that what includes the padding (MTP's own loss) is the same too
LENGTH = 32
# Weighted so that OISD makes up about half of the gradients: in half precision too a wrong one stands out.
OISD_CONFIG = OISDConfig(layers=(2,), attn_window=3, attn_global_keys=3, lambda_think=20.0, lambda_attn=20.0)


@dataclass(frozen=True)
class Layout:
    """What is run: a model, and how it lies on the ranks."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int | None = None
    sequence_parallel: bool = False
    micro_batch: int = 1
    oisd: OISDConfig | None = OISD_CONFIG
    model: str = "dense"
    tied: bool = False
    dtype: torch.dtype = torch.float32
    config: tuple[tuple[str, Any], ...] = ()
    ddp: tuple[tuple[str, Any], ...] = ()
    packed: bool = False
    variable: bool = False
    per_token_loss: bool = True
    loss_scale: float | None = None
    steps: int = 1
    """Forward-backward passes, of which the last one's gradients count; weights stay."""
    tolerance: float = 2e-5
    """fp32 against float64: sums of a few hundred terms in another order."""

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def key(self) -> tuple[Any, ...]:
        """What the reference depends on."""
        rounded = self.dtype if self.dtype in (torch.bfloat16, torch.float16) else None
        frozen = dict(self.config).get("frozen")
        # Without per-token loss the policy loss is a mean over microbatches of token means.
        return (self.model, self.tied, self.oisd, self.per_token_loss, rounded, frozen, self.kv_groups)

    @property
    def kv_groups(self) -> int:
        return dict(self.config).get("num_query_groups", 2)


# ---------------------------------------------------------------------------------------------------------- the batch


@dataclass
class Rollouts:
    """Position t of the ``[B, s]`` tensors speaks of the prediction of token t + 1."""

    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor
    lengths: list[int]


def make_rollouts(num_sequences: int = 4, seed: int = 11) -> Rollouts:
    """Ragged sequences, advantages of both signs, one clipped, one exactly zero, ratios off 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (num_sequences, LENGTH), generator=generator)
    lengths = [24, 32, 16, 28][:num_sequences]  # multiples of 4: CP 2 cuts sequences into 4 parts
    mask = torch.zeros(num_sequences, LENGTH, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 3 + row : length - 2 + row % 2] = True
    old = -5.0 + 0.1 * torch.randn(num_sequences, LENGTH, generator=generator)
    return Rollouts(tokens, mask, torch.tensor([0.7, -1.6, 0.4, 0.0])[:num_sequences], old, lengths)


# ---------------------------------------------------------------------------------------------------------- the model


def transformer(layout: Layout) -> Any:
    """Megatron's configuration of the layout's model."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_oisd.runtime.model import ModelArguments, transformer_config

    arguments = ModelArguments(
        num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, kv_channels=32,
        vocab_size=VOCAB, max_position_embeddings=128, rotary_base=10000.0, layernorm_epsilon=1e-6, qk_layernorm=True,
    )  # fmt: skip
    overrides: dict[str, Any] = {
        "finalize_model_grads_func": finalize_model_grads,
        "calculate_per_token_loss": layout.per_token_loss,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
    }
    if layout.model == "moe":
        overrides |= {
            "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none", "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": False, "moe_router_dtype": "fp64",
            "moe_aux_loss_coeff": 0.0, "moe_permute_fusion": False,
        }  # fmt: skip
    if layout.model == "mla":
        overrides |= {
            "multi_latent_attention": True, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 32,
            "qk_pos_emb_head_dim": 8, "v_head_dim": 32, "rope_type": "rope", "num_query_groups": 4,
        }  # fmt: skip
    if layout.model == "window":
        overrides |= {"window_size": (5, 0), "window_attn_skip_freq": 2}
    if layout.model == "mtp":
        overrides |= {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}
    known = {item.name for item in fields(MLATransformerConfig)}
    overrides = {name: value for name, value in overrides.items() if name in known or name not in LATER}
    overrides |= {name: value for name, value in layout.config if name != "frozen"}
    make: Any = transformer_config
    if layout.model == "mla":
        make = _mla_config
    return make(
        arguments, tensor_parallel=layout.tp, pipeline_parallel=layout.pp, virtual_pipeline=layout.vpp,
        sequence_parallel=layout.sequence_parallel, dtype=layout.dtype, **overrides,
    )  # fmt: skip


def _mla_config(*args: Any, **kwargs: Any) -> Any:
    """``transformer_config`` with Megatron's MLA class in the place of the ordinary one."""
    from megatron.core import transformer as package
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_oisd.runtime.model import transformer_config

    ordinary = package.TransformerConfig
    package.TransformerConfig = MLATransformerConfig
    try:
        return transformer_config(*args, **kwargs)
    finally:
        package.TransformerConfig = ordinary


def _swap(spec: Any, replacements: dict[Any, Any]) -> None:
    """Replace modules anywhere in a layer spec, in place."""
    for name, value in list(vars(spec).items()):
        if isinstance(value, type) and value in replacements:
            setattr(spec, name, replacements[value])
        elif hasattr(value, "module") and isinstance(value.module, type) and value.module in replacements:
            setattr(spec, name, replacements[value.module])
        for item in value if isinstance(value, list) else [value]:
            if is_dataclass(item) and not isinstance(item, type):
                _swap(item, replacements)


def build_chunks(layout: Layout, config: Any) -> list[nn.Module]:
    """This rank's bare model chunks."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_oisd.runtime.attention import UnfusedAttention
    from megatron_oisd.runtime.model import SequenceParallelRMSNorm, pipeline_ends, taken, virtual_stage

    replacements = {specs.LNImpl: SequenceParallelRMSNorm, WrappedTorchNorm: SequenceParallelRMSNorm}
    # Megatron's own attention wherever it can do it.
    if layout.packed or layout.cp > 1 or layout.model == "mla":
        replacements[DotProductAttention] = UnfusedAttention
    chunks = []
    for vp_stage in [None] if layout.vpp is None else range(layout.vpp):
        with virtual_stage(vp_stage):
            extra = taken(specs.get_gpt_decoder_block_spec, normalization="RMSNorm", vp_stage=vp_stage)
            spec = copy.deepcopy(specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, **extra))
            options = {"vp_stage": vp_stage}
            if layout.model == "mtp":
                extra = taken(specs.get_gpt_mtp_block_spec, vp_stage=vp_stage)
                mtp = specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, **extra)
                options["mtp_block_spec"] = mtp
            for part in (spec, options.get("mtp_block_spec")):
                if part is not None:
                    _swap(part, replacements)
            first, last = pipeline_ends(vp_stage)
            chunks.append(
                GPTModel(
                    config=config, transformer_layer_spec=spec, vocab_size=PADDED, max_sequence_length=128,
                    pre_process=first, post_process=last, parallel_output=True,
                    share_embeddings_and_output_weights=layout.tied, position_embedding_type="rope",
                    rotary_base=10000, **taken(GPTModel, **options),
                )
            )  # fmt: skip
    frozen = dict(layout.config).get("frozen")
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if frozen and not _is_trained(frozen, name, chunk):
                parameter.requires_grad = False
    return chunks


def _is_trained(frozen: str, name: str, chunk: Any) -> bool:
    """``"trunk"``: low-rank fine-tuning as far as gradients are concerned: some matrices of some layers are trained.
    ``"below"``: nothing below the student is trained, the unembedding is."""
    number = None
    if ".layers." in name:
        number = chunk.decoder.layers[int(name.split(".layers.")[1].split(".")[0])].layer_number
    if frozen == "trunk":
        return number is not None and name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return (number is not None and number > 2) or "output_layer" in name or "final_layernorm" in name


def sharded(chunks: list[nn.Module]) -> Iterator[tuple[Any, Tensor]]:
    """(Megatron's ShardedTensor, the tensor as this rank has it) for every parameter."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=metadata)
        apply_factories(state)
        for value in nested_values(state):
            if isinstance(value, ShardedTensor):
                yield value, value.data


def place(shard: Any) -> tuple[Any, ...]:
    """Where a ShardedTensor's part lies in the whole tensor; releases after 0.19 have no method for it."""
    leading, offsets = shard.global_offset[: shard.prepend_axis_num], shard.global_offset[shard.prepend_axis_num :]
    parts = zip(offsets, shard.local_shape, strict=True)
    return (*leading, *(slice(offset, offset + size) for offset, size in parts))


@cache
def _whole(key: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "norm" in key:
        return 1 + 0.2 * noise
    return noise * (0.6 if "router" in key else 0.15)


def fill(chunks: list[nn.Module], rounded: torch.dtype | None = None) -> None:
    """Give every parameter the value that its global name stands for."""
    with torch.no_grad():
        for shard, tensor in sharded(chunks):
            shape = tuple(shard.global_shape)
            if "word_embeddings" in shard.key or "output_layer" in shard.key:
                value = torch.zeros(shape, dtype=torch.float64)
                value[:VOCAB] = _whole(shard.key, (VOCAB, *shape[1:]))
            else:
                value = _whole(shard.key, shape)
            part = value[place(shard)]
            tensor.copy_(part if rounded is None else part.to(rounded))


Piece = tuple[str, tuple[Any, ...], tuple[int, ...], Tensor]


def pieces(chunks: list[nn.Module]) -> list[Piece]:
    """What this rank holds of every parameter's ``main_grad``: (name, place, whole shape, values)."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                gradient = getattr(parameter, "main_grad", parameter.grad)
                value = torch.zeros_like(parameter) if gradient is None or not parameter.requires_grad else gradient
                parameter.data = value.detach().double()
    return [(s.key, place(s), tuple(s.global_shape), t.detach().clone()) for s, t in sharded(chunks)]


def assemble(ranks: list[list[Piece]]) -> tuple[dict[str, Tensor], float]:
    """Whole gradients by global name, and the largest difference between ranks that hold the same part."""
    whole: dict[str, Tensor] = {}
    apart = 0.0
    for piece in (piece for rank in ranks for piece in rank):
        key, place, shape, values = piece
        total = whole.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))
        known = total[place]
        if not known.isnan().any():
            apart = max(apart, (known - values).abs().max().item())
        total[place] = values
    for key, total in whole.items():
        if "word_embeddings" in key or "output_layer" in key:
            whole[key] = total[:VOCAB]
        assert not whole[key].isnan().any(), f"no rank holds all of {key}"
    return whole, apart
