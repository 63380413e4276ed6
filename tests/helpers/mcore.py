"""Any Megatron-Core layout against a dense float64 reference of the same model, loss and every gradient.

The model is Megatron's own ``GPTModel`` with weights that depend on their global names alone, so that every layout
holds the same model without converters: weights go in and gradients come out through ``sharded_state_dict``, which
knows what part of which tensor a rank has. The reference runs that model in one process in float64, one sequence after
the other, and computes GRPO and OISD densely with plain autograd; its losses share no code with the fast path. (That
Megatron's model is the right model is shown by ``layout.py``, against HF's.)

What runs on a layout is a training loop as somebody else would write it: Megatron's schedules, DistributedDataParallel,
``finalize_model_grads``, the public surface of OISD.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from tests.helpers.ranks import run_ranks

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


# ---------------------------------------------------------------------------------------------------------- on a layout


@dataclass
class Outcome:
    """What one rank brings back."""

    loss: float
    metrics: dict[str, float]
    gradients: list[Piece]
    extra: dict[str, Any] = field(default_factory=dict)


@contextmanager
def parallel_world(layout: Layout) -> Iterator[None]:
    from megatron.core import parallel_state, tensor_parallel

    from megatron_oisd.runtime import cpu, distributed

    cpu.install()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp, context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1 if layout.ep > 1 else None,
    )  # fmt: skip
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    try:
        yield
    finally:
        distributed.shutdown()


@dataclass
class Training:
    """One rank's share of a model under training."""

    layout: Layout
    config: Any
    bare: list[nn.Module]
    chunks: list[nn.Module]
    oisd: Any

    def forward_backward(self, batch: Rollouts, **step: Any) -> float:
        """One step's gradients, from zero; returns the policy loss as Megatron would report it (sum over tokens)."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        layout, dp = self.layout, parallel_state.get_data_parallel_group()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        order = list(range(dp.rank(), len(batch.tokens), dp.size()))
        groups = [order[i : i + layout.micro_batch] for i in range(0, len(order), layout.micro_batch)]
        context: Any = nullcontext()
        if self.oisd is not None:
            context = self.oisd.step(
                num_microbatches=len(groups), num_sequences=len(batch.tokens), num_tokens=int(batch.mask.sum()), **step
            )
        single = len(self.chunks) == 1
        length = LENGTH  # Megatron divides it by CP itself
        if layout.packed:
            length *= layout.micro_batch
        with context:
            store = get_forward_backward_func()(
                forward_step_func=partial(self.forward_step, batch),
                data_iterator=iter(groups) if single else [iter(groups) for _ in self.chunks],
                model=self.chunks[0] if single else self.chunks,
                num_microbatches=len(groups), seq_length=length,
                micro_batch_size=1 if layout.packed else layout.micro_batch, forward_only=False,
            )  # fmt: skip
        return float(sum(part.item() for part in store))

    def forward_step(self, batch: Rollouts, data_iterator: Any, model: nn.Module) -> tuple[Tensor, Any]:
        rows = next(data_iterator)
        view = View(self.layout, batch, rows)
        context: Any = nullcontext()
        if self.oisd is not None:
            context = self.oisd.microbatch(
                model, loss_mask=view.mask, advantages=view.advantages, packed_seq_params=view.packed_seq_params,
                sequence_ids=rows,
            )  # fmt: skip
        extra = {} if view.packed_seq_params is None else {"packed_seq_params": view.packed_seq_params}
        if self.layout.model == "mtp":
            extra["labels"] = view.own(view.targets)
        with context:
            output = model(view.own(view.tokens), view.own(view.position_ids), None, **extra)
        return output, partial(self.loss, view)

    def loss(self, view: View, output: Tensor) -> Any:
        from megatron.core import parallel_state

        from megatron_oisd.losses.grpo import policy_loss, vocab_parallel_log_probs
        from megatron_oisd.losses.numerics import valid_columns

        mask = view.own(view.mask)
        if self.layout.model == "mtp":
            log_probs = -output[mask]
        else:
            group, width = parallel_state.get_tensor_model_parallel_group(), output.shape[-1]
            log_probs = vocab_parallel_log_probs(
                output[mask], view.own(view.targets)[mask], group=group, first_token=group.rank() * width,
                valid_columns=valid_columns(VOCAB, group.rank(), width),
            ).log_probs  # fmt: skip
        loss = policy_loss(log_probs, view.own(view.old)[mask], view.own(view.token_advantages)[mask]).loss.sum()
        if self.layout.per_token_loss:
            return loss.clone(), mask.sum().to(torch.int), loss.detach()
        # The legacy form: Megatron averages over microbatches and data-parallel ranks.
        return loss / view.mask.sum(), loss.detach()


class View:
    """One microbatch of some rows, as rows or packed, and this context-parallel rank's part of it."""

    def __init__(self, layout: Layout, batch: Rollouts, rows: list[int]) -> None:
        from megatron.core import parallel_state
        from megatron.core.packed_seq_params import PackedSeqParams

        from megatron_oisd.pipeline.microbatch import context_positions

        self.packed_seq_params, borders = None, None
        lengths = [batch.lengths[row] for row in rows]
        self.advantages = batch.advantages[rows]
        spread = batch.advantages.unsqueeze(1).expand(batch.tokens.shape)
        tensors = [batch.tokens, batch.mask, batch.old_log_probs, spread, torch.roll(batch.tokens, -1, 1)]
        position_ids = torch.arange(LENGTH).expand(batch.tokens.shape)
        if layout.packed:
            # As Megatron packs: bins of one size, the rest of a bin a sequence of padding that nobody names.
            rest = layout.micro_batch * LENGTH - sum(lengths)
            parts = [*zip(rows, lengths, strict=True), (rows[0], rest)]
            pick = lambda tensor: torch.cat([tensor[r, :n] for r, n in parts]).unsqueeze(0)  # noqa: E731
            borders = torch.tensor([0, *lengths, rest]).cumsum(0).tolist()
            cu_seqlens = torch.tensor(borders, dtype=torch.int32)
            self.packed_seq_params = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=max(lengths),
                max_seqlen_kv=max(lengths),
            )  # fmt: skip
        else:
            width = max(lengths) if layout.variable else LENGTH
            pick = lambda tensor: tensor[rows, :width]  # noqa: E731
        self.tokens, self.mask, self.old, self.token_advantages, self.targets, self.position_ids = (
            pick(tensor) for tensor in (*tensors, position_ids)
        )
        if layout.packed and borders is not None:
            self.mask = self.mask & (torch.arange(self.mask.shape[1]) < borders[-2])
        cp = parallel_state.get_context_parallel_group()
        self._mine = context_positions(self.tokens.shape[1], borders, cp.size())[cp.rank()]

    def own(self, tensor: Tensor) -> Tensor:
        return tensor[:, self._mine]


def start(layout: Layout, batch: Rollouts) -> Training:
    """Build, fill, wrap and attach; needs :func:`parallel_world`."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from megatron_oisd import OISD

    config = transformer(layout)
    if layout.loss_scale is not None:
        config.grad_scale_func = lambda loss: loss * layout.loss_scale
    if layout.variable:
        config.variable_seq_lengths = True  # read at call time; the constructor has a check meant for MoE only
    bare = build_chunks(layout, config)
    fill(bare, layout.dtype if layout.dtype in (torch.bfloat16, torch.float16) else None)
    ddp_config = DistributedDataParallelConfig(
        **{"grad_reduce_in_fp32": layout.dtype != torch.float64, "overlap_grad_reduce": False} | dict(layout.ddp)
    )
    half = layout.dtype in (torch.bfloat16, torch.float16)
    wrapped = [Float16Module(config, chunk) if half else chunk for chunk in bare]
    chunks = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=False)
        for chunk in wrapped
    ]
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    for chunk in chunks:
        chunk.train()
    oisd = None
    if layout.oisd is not None:
        oisd = OISD(
            layout.oisd, chunks, tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            cp_group=parallel_state.get_context_parallel_group(), vocab_size=VOCAB,
        )  # fmt: skip
    return Training(layout, config, bare, chunks, oisd)


def run_layout(layout: Layout, batch: Rollouts) -> Outcome:
    """Called on every rank."""
    with parallel_world(layout):
        training = start(layout, batch)
        for _ in range(layout.steps):
            loss = training.forward_backward(batch)
        metrics = {} if training.oisd is None else training.oisd.metrics()
        for chunk in training.chunks:
            if chunk.ddp_config.use_distributed_optimizer:
                gather_shards(chunk)
        gradients = pieces(training.bare)
        if layout.loss_scale is not None:
            gradients = [(*piece[:3], piece[3] / layout.loss_scale) for piece in gradients]
        if training.oisd is not None:
            training.oisd.detach()
        return Outcome(loss, metrics, gradients)


def gather_shards(chunk: Any) -> None:
    """The distributed optimizer leaves each data-parallel rank its own shard of every gradient bucket."""
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


# ---------------------------------------------------------------------------------------------------------- reference


def run_reference(layout: Layout, batch: Rollouts) -> Outcome:
    """The dense losses of the same model in one process, in float64; called on one rank."""
    alone = Layout(
        "reference", model=layout.model, tied=layout.tied, oisd=layout.oisd, dtype=torch.float64,
        config=tuple((k, v) for k, v in layout.config if k in ("frozen", "num_query_groups")),
    )  # fmt: skip
    with parallel_world(alone):
        config = transformer(alone)
        (model,) = build_chunks(alone, config)
        half = layout.dtype if layout.dtype in (torch.bfloat16, torch.float16) else None
        fill([model], half)
        model.train()
        dense = DenseLosses(model, layout, batch)
        values = dense.backward()
        return Outcome(values.pop("loss"), values, pieces([model]))


class DenseLosses:
    """GRPO + OISD straight from the equations, sequence by sequence; gradients by plain autograd."""

    def __init__(self, model: Any, layout: Layout, batch: Rollouts) -> None:
        from megatron_oisd.pipeline.checks import shared_sliding_window

        self.model, self.layout = model, layout
        self.oisd = layout.oisd or replace(OISD_CONFIG, lambda_think=0.0, lambda_attn=0.0)
        self.kept: dict[Any, Any] = {}
        window = shared_sliding_window(model.config, (*self.oisd.layers, 4))
        self.left = None if window is None else window[0]
        for layer in model.decoder.layers:
            number = layer.layer_number
            layer.register_forward_hook(partial(self._keep, ("hidden", number)))
            layer.self_attention.core_attention.register_forward_hook(
                partial(self._keep_scores, number, layer.self_attention), with_kwargs=True
            )
        self.take(batch, layout.steps - 1)

    def take(self, batch: Rollouts, step: int) -> None:
        """Go on with another batch, as that of optimizer step ``step``."""
        from megatron_oisd.losses.attention import sample_query_positions

        self.batch = batch
        self.queries = sample_query_positions(
            batch.mask, num_queries=self.oisd.attn_queries, seed=self.oisd.seed, step=step,
            sequence_ids=list(range(len(batch.tokens))),
        )  # fmt: skip

    def _keep(self, name: Any, module: Any, args: Any, output: Any) -> None:
        self.kept[name] = output[0] if isinstance(output, tuple) else output

    def _keep_scores(self, number: int, attention: Any, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        query, key = (args[0], args[1]) if len(args) > 1 else (kwargs["query"], kwargs["key"])
        scale = getattr(attention, "softmax_scale", None) or 1 / math.sqrt(query.shape[-1])
        self.kept["qk", number] = query[:, 0], key[:, 0].repeat_interleave(query.shape[2] // key.shape[2], 1), scale

    def _lens(self, hidden: Tensor) -> Tensor:
        model = self.model
        weight = model.shared_embedding_or_output_weight() if self.layout.tied else model.output_layer.weight
        norm = dict(model.decoder.final_layernorm.named_parameters())
        if not self.oisd.head_gradient:
            weight, norm = weight.detach(), {name: value.detach() for name, value in norm.items()}
        normed = torch.func.functional_call(model.decoder.final_layernorm, norm, (hidden,))
        return normed @ weight[:VOCAB].t()

    def _scores(self, number: int, t: int, keys: list[int]) -> Tensor:
        query, key, scale = self.kept["qk", number]
        return torch.stack([key[keys, j] @ query[t, j] * scale for j in range(query.shape[1])])

    def _keys(self, t: int) -> list[int]:
        from megatron_oisd.losses.reference import sampled_key_positions

        first = 0 if self.left is None else max(0, t - self.left)
        positions = sampled_key_positions(t - first, self.oisd.attn_window, self.oisd.attn_global_keys)
        return [first + position for position in positions]

    @property
    def loss_tokens(self) -> float:
        """What the sum of the policy loss is divided by."""
        return float(self.batch.mask.sum())

    def log_probs(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``[s]`` log-probability of each target under the policy; ``logits`` has the padding's columns too."""
        return logits[:, :VOCAB].log_softmax(-1).gather(-1, targets.unsqueeze(1)).squeeze(1)

    def policy_loss(self, row: int, log_probs: Tensor, advantage: Tensor) -> Tensor:
        """``[s]`` loss of each prediction of a sequence."""
        from megatron_oisd.losses import reference as ref

        return ref.policy_loss(log_probs, self.batch.old_log_probs[row].double(), advantage, 0.2, 0.2, 10.0)

    def backward(self) -> dict[str, float]:
        from megatron_oisd.losses import reference as ref

        batch, oisd, layers = self.batch, self.oisd, self.oisd.layers
        total_tokens, count = batch.mask.sum(), len(batch.tokens)
        names = [f"oisd/{kind}/layer_{n}" for kind in ("think", "attn") for n in layers]
        values = dict.fromkeys(["loss", *names], 0.0)
        if self.layout.model == "mtp":
            from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

            MTPLossAutoScaler.set_loss_scale(1.0 / total_tokens.double())
        for i in range(count):
            tokens, where = batch.tokens[i : i + 1], batch.mask[i].nonzero().flatten().tolist()
            positions = torch.arange(LENGTH).unsqueeze(0)
            targets = torch.roll(tokens, -1, 1)
            extra = {"labels": targets} if self.layout.model == "mtp" else {}
            output = self.model(tokens, positions, None, **extra)
            advantage, weight = batch.advantages[i].double(), batch.advantages[i].double()
            weight = weight.clamp(-oisd.advantage_clip, oisd.advantage_clip)
            if extra:
                log_probs = -output[0]
                final = self._lens(self.kept["hidden", 4][:, 0]).detach()
            else:
                final = output[0, :, :VOCAB]
                log_probs = self.log_probs(output[0], targets[0])
            per_token = self.policy_loss(i, log_probs, advantage)[where]
            # A microbatch of one sequence: its token mean, averaged over microbatches.
            policy = per_token.sum() / self.loss_tokens if self.layout.per_token_loss else per_token.mean() / count
            share = len(where) / total_tokens if oisd.aggregation == "token" else 1.0 / count
            values["loss"] += per_token.sum().item()
            total = policy
            for number in layers:
                if oisd.lambda_think:
                    student = self._lens(self.kept["hidden", number][:, 0])
                    divergence = ref.jensen_shannon(student[where], final[where], oisd.temperature)
                    think = share * weight * divergence.mean()
                    total = total + oisd.lambda_think / len(layers) * think
                    values[f"oisd/think/layer_{number}"] += think.item()
                if oisd.lambda_attn:
                    queries = self.queries[i].nonzero().flatten().tolist()
                    each = [
                        ref.jensen_shannon(self._scores(number, t, keys), self._scores(4, t, keys)).mean()
                        for t, keys in ((t, self._keys(t)) for t in queries)
                    ]
                    attn = share * weight * torch.stack(each).mean()
                    total = total + oisd.lambda_attn / len(layers) * attn
                    values[f"oisd/attn/layer_{number}"] += attn.item()
            total.backward()
        return values


_known: dict[tuple[Any, ...], tuple[Outcome, dict[str, Tensor]]] = {}


def reference(layout: Layout) -> tuple[Outcome, dict[str, Tensor]]:
    """The reference's values and whole gradients; the same for every layout of one model."""
    if layout.key not in _known:
        (outcome,) = run_ranks(1, run_reference, layout, make_rollouts())
        _known[layout.key] = outcome, assemble([outcome.gradients])[0]
    return _known[layout.key]


# ---------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Verdict:
    """How far a layout is from the reference."""

    value_error: float
    """Largest relative difference of policy loss and OISD losses."""
    gradient_error: float
    """Largest ``max|difference| / max|expected|`` over all parameters; half precision: norm over norm."""
    parameter: str
    """Where."""
    apart: float
    """Largest difference between ranks that hold the same part, over the largest gradient."""

    def within(self, tolerance: float) -> bool:
        return max(self.value_error, self.gradient_error, self.apart) < tolerance


def judge(layout: Layout) -> Verdict:
    """Run the layout and compare it with the reference."""
    expected, whole = reference(layout)
    outcomes = run_ranks(layout.world, run_layout, layout, make_rollouts())
    found, apart = assemble([outcome.gradients for outcome in outcomes])
    assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
    half = layout.dtype in (torch.bfloat16, torch.float16)
    errors = {}
    for name, gradient in whole.items():
        difference = found[name] - gradient
        size = torch.linalg.vector_norm if half else (lambda tensor: tensor.abs().max())
        errors[name] = (size(difference) / size(gradient).clamp_min(1e-12)).item()
    worst = max(errors, key=errors.__getitem__)
    wrong = []
    for outcome in outcomes:
        for name, value in expected.metrics.items():
            if value:
                wrong.append(abs(outcome.metrics[name] - value) / abs(value))
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    return Verdict(max(wrong, default=0.0), errors[worst], worst, apart / largest)
