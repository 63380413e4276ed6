"""Which rank and model chunk owns which decoder layer, and where the two teachers are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_oisd.errors import OISDError
from megatron_oisd.losses.numerics import Group, group_size


def unwrap(chunk: nn.Module) -> Any:
    """Return the decoder model inside DDP, Float16Module and the like: the first one with a ``decoder``."""
    module: Any = chunk
    while not hasattr(module, "decoder"):
        if not isinstance(getattr(module, "module", None), nn.Module):
            raise OISDError(
                f"cannot attach to {type(chunk).__name__}: no Megatron-Core decoder inside; pass the model chunks that "
                "the pipeline schedule is given (GPTModel, wrapped or not)"
            )
        module = module.module
    return module


def device_of(models: list[Any]) -> torch.device:
    """Where the chunks live; a chunk, and with custom pipeline layouts a rank, may be without a parameter."""
    for model in models:
        for parameter in model.parameters():
            return parameter.device
    return torch.empty(0, device=torch.cuda.current_device()).device


@dataclass(frozen=True)
class Source:
    """A model chunk that makes teachers, and which ones."""

    kinds: tuple[str, ...]
    """``"attn"``: the last decoder layer is there. ``"think"``: the final norm and the unembedding are."""
    stage: int
    chunk: int
    """Number of the chunk on its stage."""


@dataclass(frozen=True)
class Placement:
    """Where every decoder layer of one pipeline lives; equal on all its ranks."""

    stage_of: dict[int, int]
    """Pipeline rank that owns each layer, layers counted from 1."""
    head: tuple[int, int]
    """(pipeline rank, chunk) with the final norm and the unembedding."""
    last_layer: tuple[int, int]
    """(pipeline rank, chunk) with the last decoder layer: elsewhere where the loss stands alone on a stage."""
    num_layers: int

    def sources(self, kinds: tuple[str, ...]) -> list[Source]:
        """The chunks that make the teachers of ``kinds``; one chunk where the last layer and the head share it."""
        makers = {"attn": self.last_layer, "think": self.head}
        found: dict[tuple[int, int], list[str]] = {}
        for kind in kinds:
            found.setdefault(makers[kind], []).append(kind)
        return [Source(tuple(sorted(made)), *where) for where, made in sorted(found.items())]


def find_placement(models: list[Any], pp_group: Group) -> Placement:
    """Gather every chunk's layer numbers over the pipeline group (one small object collective).

    Raises:
        OISDError: layers are missing or held twice, no chunk or several hold the output layer, or the final norm is
            not beside it (MTP layers on a stage of their own).
    """
    mine = [
        ([layer.layer_number for layer in model.decoder.layers], bool(model.post_process), _has_norm(model))
        for model in models
    ]
    gathered: list[Any] = [mine]
    if group_size(pp_group) > 1:
        gathered = [None] * group_size(pp_group)
        dist.all_gather_object(gathered, mine, group=pp_group)
    where: dict[int, tuple[int, int]] = {}
    heads: list[tuple[int, int]] = []
    for stage, chunks in enumerate(gathered):
        for number, (layers, has_head, has_norm) in enumerate(chunks):
            for layer in layers:
                if layer in where:
                    raise OISDError(
                        f"layer {layer} is on pipeline stages {where[layer][0]} and {stage}: expected one; pass each "
                        "model chunk once and the pipeline group that this rank belongs to"
                    )
                where[layer] = (stage, number)
            if has_head:
                heads.append((stage, number))
                if not has_norm:
                    raise OISDError(
                        f"pipeline stage {stage} has the output layer but no decoder.final_layernorm beside it: place "
                        "the last decoder layer and any MTP layers on the last stage; models without a norm of that "
                        "name (hybrid ones) are not supported"
                    )
    num_layers = max(where, default=0)
    missing = sorted(set(range(1, num_layers + 1)) - set(where))
    if missing or len(heads) != 1 or not where:
        raise OISDError(
            f"the pipeline group holds layers {sorted(where)} and output layers on stages {[s for s, _ in heads]}: "
            "expected every layer and one output layer; pass all model chunks of this rank and the pipeline group "
            "they belong to"
        )
    stage_of = {layer: stage for layer, (stage, _) in where.items()}
    return Placement(stage_of, heads[0], where[num_layers], num_layers)


def _has_norm(model: Any) -> bool:
    return getattr(model.decoder, "final_layernorm", None) is not None
