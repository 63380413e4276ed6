"""Moves weights between full HF tensors and a live Megatron model, in any TP/PP/VPP/EP layout.

:func:`load_hf_weights` cuts this rank's shards out of full tensors, without communication. :func:`export_hf_weights` is
the way back, a collective that serves the rollout engine after every optimizer step and the HF export alike. What a
parameter is made of is the rule table of :mod:`megatron_oisd.convert.families`; nothing here knows a family.

Process groups come from the caller or from the model itself, never from global state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from megatron_oisd.convert.families import IGNORED_HF_SUFFIXES, dimensions, expand, hf_shapes, numbered, rules_for
from megatron_oisd.convert.fused import unfused, unfused_names
from megatron_oisd.convert.rules import EXPERT, LAYER, Rule
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

BUCKET_BYTES = 64 * 2**20
"""Bytes of one stage's shard that travel in one broadcast (and one gather, which receives TP times as many)."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def load_hf_weights(
    chunks: list[nn.Module],
    arguments: ModelArguments,
    tensors: Mapping[str, Tensor],
    *,
    progress: bool = False,
) -> None:
    """Fill the model chunks of this rank from full HF tensors; no communication.

    Values are cast to each parameter's dtype. Rows of the vocabulary beyond ``arguments.vocab_size`` become zero. An
    optimizer with its own fp32 copies must be told afterwards (``optimizer.reload_model_params()``).

    Args:
        chunks: this rank's ``GPTModel`` chunks, bare or wrapped (DistributedDataParallel, Float16Module).
        arguments: the model's shape.
        tensors: full HF tensors by name; looked up once each, so a lazy mapping reads no more than it must. Experts
            may be fused (``[experts, ...]``).
        progress: show a progress bar.

    Raises:
        OISDError: a tensor is missing, has another shape than ``arguments`` say or is quantised, a parameter of the
            model has no rule, TP does not divide the number of query groups or EP that of experts.
    """
    sizes = dimensions(arguments)
    local = local_parameters(chunks, arguments)
    tensors = unfused(tensors, arguments)
    for entry in tqdm(local, desc="weights", unit="tensor", disable=not progress):
        parts = []
        for source in entry.rule.hf:
            name = numbered(source.name, entry.layer)
            shape = tuple(sizes[symbol] for symbol in source.shape)
            parts.append(checked(tensors, name, shape))
        shard = cut(entry.rule, parts, arguments, entry.tp_rank, entry.tp_size, entry.parameter.shape)
        if shard.shape != entry.parameter.shape:
            raise OISDError(
                f"parameter {numbered(entry.rule.megatron[0], entry.layer)} has shape {tuple(entry.parameter.shape)}, "
                f"and the HF tensors give {tuple(shard.shape)}: the model was not built from this config.json"
            )
        entry.parameter.copy_(shard)


def export_hf_weights(
    chunks: list[nn.Module],
    arguments: ModelArguments,
    *,
    tp_group: dist.ProcessGroup,
    pp_group: dist.ProcessGroup,
    ep_group: dist.ProcessGroup | None = None,
    expert_tp_group: dist.ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every HF tensor of the model, whole, on every rank of the model-parallel group.

    A collective: every rank of ``tp_group`` x ``pp_group`` (x ``ep_group``, for a model with experts) must iterate to
    the end. Names come in the order of the forward pass, the same on all ranks; padded vocabulary rows are cut; a tied
    ``lm_head`` is not emitted; experts come one by one, never fused. Each tensor owns its storage, so that it may be
    kept or changed. Parameters are read when their bucket is packed: do not step the optimizer between first and last
    item. With overlapped parameter gathers, wait for them first
    (``DistributedDataParallel.start_param_sync(force_sync=True)``).

    Communication: one ``all_gather_object`` of names over ``pp_group``; then per bucket of ``bucket_bytes`` one
    broadcast of the owning stage's shards over ``pp_group`` and one all-gather over ``tp_group``. A bucket of experts
    is broadcast over the pipelines of the rank of ``ep_group`` that owns them, then over ``ep_group``, and gathered
    over ``expert_tp_group``. A group of one rank is not used at all.

    Args:
        chunks: this rank's model chunks, bare or wrapped.
        arguments: the model's shape.
        tp_group: tensor-parallel group of this rank.
        pp_group: pipeline-parallel group of this rank.
        ep_group: expert-parallel group of this rank; None for the model's own.
        expert_tp_group: tensor-parallel group of its experts; None for the model's own.
        dtype: dtype of the yielded tensors, cast **before** they travel; None for the parameters' own.
        bucket_bytes: size of a bucket, as above.
    """
    local = [entry for entry in local_parameters(chunks, arguments) if entry.rule.copy_of is None]
    mine = {(entry.rule.megatron[0], entry.layer): entry.parameter.detach() for entry in local}
    pp_size, pp_rank = pp_group.size(), pp_group.rank()
    experts = _expert_groups(chunks, arguments, ep_group, expert_tp_group)
    # Data, not assumptions about the layout: uneven and custom pipeline splits export too.
    headers: _Header = {
        (entry.rule.key, entry.layer): (tuple(entry.parameter.shape), dtype or entry.parameter.dtype) for entry in local
    }
    by_stage: list[_Header] = [headers] * pp_size
    if pp_size > 1:
        by_stage = [{}] * pp_size
        dist.all_gather_object(by_stage, headers, group=pp_group)
    owners = {key: stage for stage, keys in enumerate(by_stage) for key in keys}

    device = next(iter(mine.values())).device if mine else torch.empty(0, device="cuda").device
    for bucket in _buckets(arguments, owners, by_stage, bucket_bytes, experts.per_rank):
        group = tp_group if bucket.ep_rank is None else experts.tp_group
        in_pipeline = bucket.ep_rank is None or bucket.ep_rank == experts.ep_rank
        if in_pipeline and bucket.stage == pp_rank:
            flat = torch.cat([mine[item.key].reshape(-1).to(bucket.dtype) for item in bucket.items])
        else:
            flat = torch.empty(sum(item.numel for item in bucket.items), dtype=bucket.dtype, device=device)
        if in_pipeline and pp_size > 1:
            dist.broadcast(flat, src=dist.get_global_rank(pp_group, bucket.stage), group=pp_group)
        if bucket.ep_rank is not None and experts.ep_size > 1:
            dist.broadcast(flat, src=dist.get_global_rank(experts.ep_group, bucket.ep_rank), group=experts.ep_group)
        shards = flat[None]
        if group.size() > 1:
            shards = flat.new_empty(group.size(), flat.numel())
            dist.all_gather_into_tensor(shards.view(-1), flat, group=group)
        offset = 0
        for item in bucket.items:
            pieces = [shard[offset : offset + item.numel].view(item.shape) for shard in shards]
            offset += item.numel
            for source, full in zip(item.rule.hf, assemble(item.rule, pieces, arguments), strict=True):
                yield numbered(source.name, item.layer), full


def check_tensor_names(arguments: ModelArguments, names: Iterable[str], where: str = "the HF checkpoint") -> None:
    """Raise :class:`OISDError` unless ``names`` are the HF tensors of the model, no fewer and no more.

    A stored ``lm_head`` next to tied embeddings is accepted, as transformers does: tied weights ignore it. So are
    experts in fused form.
    """
    expected, given = set(hf_shapes(arguments)), unfused_names(names, arguments)
    missing = sorted(expected - given)
    if missing:
        raise OISDError(
            f"{where} lacks {_some(missing)}: the checkpoint is incomplete or config.json is another model's"
        )
    if not arguments.untie_embeddings_and_output_weights:
        expected.add("lm_head.weight")
    unknown = sorted(name for name in given - expected if not name.endswith(IGNORED_HF_SUFFIXES))
    if unknown:
        raise OISDError(
            f"{where} has {_some(unknown)}, which {arguments.architecture} does not: "
            f"config.json is another model's, or the "
            f"checkpoint holds adapters or quantised weights (merge or dequantise them first)"
        )


_Header = dict[tuple[str, int | None], tuple[tuple[int, ...], torch.dtype]]
"""What a pipeline stage holds: shape and dtype by :attr:`Rule.key` and layer; experts have the same."""


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank and what it is."""

    rule: Rule
    layer: int | None  # 0-based, in the whole model
    parameter: nn.Parameter
    tp_rank: int
    tp_size: int


@dataclass(frozen=True)
class _Item:
    """One parameter inside a bucket: the shape is that of one TP shard."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[str, int | None]:
        return self.rule.megatron[0], self.layer

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Bucket:
    """Parameters next to each other in the model that one stage owns (for experts: one EP rank of it) and that share
    a dtype."""

    stage: int
    ep_rank: int | None
    dtype: torch.dtype
    items: list[_Item]


def _buckets(
    arguments: ModelArguments,
    owners: Mapping[tuple[str, int | None], int],
    by_stage: list[_Header],
    bucket_bytes: int,
    experts_per_rank: int,
) -> Iterator[_Bucket]:
    """Cut the whole model, in the order of its forward pass, into buckets; the same on every rank."""
    current: _Bucket | None = None
    filled = 0
    for rule, layer in expand(arguments):
        if rule.copy_of is not None:
            continue
        key = rule.key, layer
        assert key in owners, f"no pipeline stage owns {numbered(*key)}"
        stage = owners[key]
        ep_rank = None if rule.expert is None else rule.expert // experts_per_rank
        shape, dtype = by_stage[stage][key]
        item = _Item(rule, layer, shape)
        size = item.numel * dtype.itemsize
        if current and (
            (current.stage, current.ep_rank, current.dtype) != (stage, ep_rank, dtype) or filled + size > bucket_bytes
        ):
            yield current
            current = None
        if current is None:
            current, filled = _Bucket(stage, ep_rank, dtype, []), 0
        current.items.append(item)
        filled += size
    if current:
        yield current


@dataclass(frozen=True)
class _Experts:
    """How the experts lie on the ranks; of a model without any nothing is used."""

    ep_group: Any
    tp_group: Any
    per_rank: int

    @property
    def ep_size(self) -> int:
        return int(self.ep_group.size()) if self.ep_group else 1

    @property
    def ep_rank(self) -> int:
        return int(self.ep_group.rank()) if self.ep_group else 0


def _expert_groups(
    chunks: list[nn.Module],
    arguments: ModelArguments,
    ep_group: dist.ProcessGroup | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> _Experts:
    if arguments.num_experts is None:
        return _Experts(None, None, 1)
    chunk = unwrap(chunks[0])
    experts = _Experts(ep_group or _group_of(chunk, "ep"), tp_group or _group_of(chunk, "expt_tp"), 1)
    if arguments.num_experts % experts.ep_size:
        raise OISDError(
            f"EP {experts.ep_size} does not divide the model's {arguments.num_experts} experts: use an EP that does"
        )
    return replace(experts, per_rank=arguments.num_experts // experts.ep_size)


def _group_of(chunk: Any, name: str) -> Any:
    """A process group of the model's; in releases whose models keep none, Megatron's global one."""
    own = getattr(chunk, "pg_collection", None)
    if own is not None:
        return getattr(own, name)
    from megatron.core import parallel_state

    long = {"tp": "tensor_model", "ep": "expert_model", "expt_tp": "expert_tensor"}[name]
    return getattr(parallel_state, f"get_{long}_parallel_group")()


def unwrap(chunk: nn.Module) -> Any:
    """Return the ``GPTModel`` inside DistributedDataParallel and Float16Module."""
    inner: Any = chunk
    while not hasattr(inner, "decoder") and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    assert hasattr(inner, "decoder"), f"{type(inner).__name__} holds no GPTModel"
    return inner


def local_parameters(chunks: list[nn.Module], arguments: ModelArguments) -> list[LocalParameter]:
    """Every parameter of this rank's chunks with its rule, in the chunks' own order; experts by their whole number."""
    rules = {name: rule for rule in rules_for(arguments) for name in rule.megatron}
    of_experts = [
        (re.compile(re.escape(name).replace(re.escape(EXPERT), r"(\d+)")), rule)
        for name, rule in rules.items()
        if rule.per_expert
    ]
    entries = []
    for chunk in map(unwrap, chunks):
        tp_group: Any = _group_of(chunk, "tp")
        tp_size, tp_rank = tp_group.size(), tp_group.rank()
        if arguments.num_query_groups % tp_size:
            raise OISDError(
                f"TP {tp_size} does not divide the model's {arguments.num_query_groups} query groups: "
                f"use a TP that does"
            )
        experts = _expert_groups([chunk], arguments)
        layers: Any = chunk.decoder.layers
        for name, parameter in chunk.named_parameters():
            pattern, layer = name, None
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                # The module knows its place in the whole model; its index in the chunk says nothing under PP.
                layer = layers[int(local)].layer_number - 1
                pattern = f"decoder.layers.{LAYER}.{rest}"
            if pattern in rules:
                entries.append(LocalParameter(rules[pattern], layer, parameter, tp_rank, tp_size))
                continue
            found = next(((m, rule) for known, rule in of_experts if (m := known.fullmatch(pattern))), None)
            if found is None:
                raise OISDError(
                    f"the model has a parameter {name} that {arguments.architecture} does not: "
                    f"the model was built with options that the converter does not know"
                )
            match, rule = found
            number = experts.ep_rank * experts.per_rank + int(match[1])
            group = experts.tp_group
            entries.append(LocalParameter(rule.of_expert(number), layer, parameter, group.rank(), group.size()))
    return entries


def checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The HF tensor of this name; :class:`OISDError` unless it is there, of this shape and a weight's type."""
    try:
        tensor = tensors[name]
    except KeyError:
        raise OISDError(
            f"HF tensor {name} is missing: the checkpoint is incomplete or config.json is another model's"
        ) from None
    if tuple(tensor.shape) != shape:
        raise OISDError(f"HF tensor {name} has shape {tuple(tensor.shape)}, and config.json says {shape}")
    if tensor.dtype not in _FLOATS:
        raise OISDError(
            f"HF tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, expected a floating-point type "
            f"of 16 bits or more: quantised weights cannot be trained, use the unquantised checkpoint"
        )
    return tensor


def cut(
    rule: Rule, parts: list[Tensor], arguments: ModelArguments, tp_rank: int, tp_size: int, shape: torch.Size
) -> Tensor:
    """Return shard ``tp_rank`` of the parameter; ``shape`` is the parameter's, for the padding of the vocabulary."""
    if rule.layout == "qkv":
        groups = arguments.num_query_groups
        tail = parts[0].shape[1:]
        grouped = [part.reshape(groups, -1, *tail) for part in parts]
        mine = [_slice(part, 0, tp_rank, tp_size) for part in grouped]
        return torch.cat(mine, dim=1).flatten(0, 1)
    if rule.layout == "gate_up":
        return torch.cat([_slice(part, 0, tp_rank, tp_size) for part in parts])
    (part,) = parts
    if rule.layout == "vocabulary":
        rows = part[shape[0] * tp_rank : shape[0] * (tp_rank + 1)]
        return torch.cat([rows, rows.new_zeros(shape[0] - len(rows), *rows.shape[1:])])
    return part if rule.tp_axis is None else _slice(part, rule.tp_axis, tp_rank, tp_size)


def _slice(tensor: Tensor, axis: int, index: int, count: int) -> Tensor:
    size = tensor.shape[axis] // count
    return tensor.narrow(axis, index * size, size)


def assemble(rule: Rule, shards: list[Tensor], arguments: ModelArguments) -> list[Tensor]:
    """Inverse of :func:`cut`: the HF tensors, with storage of their own, from all TP shards in order."""
    if rule.layout == "qkv":
        head, tail = arguments.kv_channels, shards[0].shape[1:]
        queries = arguments.num_attention_heads // arguments.num_query_groups
        grouped = torch.cat([shard.view(-1, (queries + 2) * head, *tail) for shard in shards])
        parts = grouped.split([queries * head, head, head], dim=1)
        return [part.flatten(0, 1).clone(memory_format=torch.contiguous_format) for part in parts]
    if rule.layout == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat(pieces) for pieces in zip(*halves, strict=True)]
    if rule.tp_axis is None:
        return [shards[0].clone()]
    if rule.layout == "vocabulary":
        rows, kept, remaining = [], shards[0].shape[0], arguments.vocab_size
        for shard in shards:
            rows.append(shard[: max(0, min(kept, remaining))])
            remaining -= kept
        return [torch.cat(rows)]
    return [torch.cat(shards, dim=rule.tp_axis)]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
