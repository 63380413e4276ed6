"""Which rank and model chunk owns which decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Placement:
    """Where every decoder layer of one pipeline lives; equal on all its ranks."""

    stage_of: dict[int, int]
    """Pipeline rank that owns each layer, layers counted from 1."""
    last_stage: int
    """Pipeline rank with the final norm and the unembedding."""
    num_layers: int


def find_placement(models: list[Any], pp_group: Group) -> Placement:
    """Gather every stage's layer numbers over the pipeline group (one small object collective).

    Raises:
        OISDError: layers are missing or held twice, or no stage or several hold the final norm.
    """
    layers = [layer.layer_number for model in models for layer in model.decoder.layers]
    has_head = any(model.post_process for model in models)
    gathered: list[Any] = [(layers, has_head)]
    if group_size(pp_group) > 1:
        gathered = [None] * group_size(pp_group)
        dist.all_gather_object(gathered, (layers, has_head), group=pp_group)
    stage_of: dict[int, int] = {}
    for stage, (numbers, _) in enumerate(gathered):
        for number in numbers:
            if number in stage_of:
                raise OISDError(f"layer {number} is on pipeline stages {stage_of[number]} and {stage}: expected one")
            stage_of[number] = stage
    num_layers = max(stage_of, default=0)
    missing = sorted(set(range(1, num_layers + 1)) - set(stage_of))
    heads = [stage for stage, (_, head) in enumerate(gathered) if head]
    if missing or len(heads) != 1:
        raise OISDError(
            f"the pipeline group holds layers {sorted(stage_of)} and output layers on stages {heads}: expected every "
            "layer and one output layer; pass all model chunks of this rank and the pipeline group they belong to"
        )
    return Placement(stage_of, heads[0], num_layers)
