"""Megatron-LM's own loading of a checkpoint: its builder, its ``load_checkpoint``, its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.helpers.megatron_lm_cases import initialise


@dataclass
class Loaded:
    """What one rank has after loading."""

    iteration: int
    logits: Tensor | None
    """``[b, s, v]`` of the whole padded vocabulary, on the last stage."""
    args: dict[str, Any]
    error: str = ""


class NormWithState(torch.nn.RMSNorm):
    """Saves and takes what Transformer Engine's RMSNorm does without fp8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


def load_and_run(arguments: list[str], tokens: Tensor, names: list[str], extra_state: bool = False) -> Loaded:
    """Called on every rank.

    Args:
        arguments: Megatron-LM's.
        tokens: ``[b, s]`` what to run.
        names: which of Megatron-LM's arguments to report.
        extra_state: give the norms that Transformer Engine leaves alone an ``_extra_state``, as its own have.
    """
    from gpt_builders import gpt_builder
    from megatron.core.enums import ModelType
    from megatron.training import get_args, training
    from model_provider import model_provider

    initialise(arguments)
    args = get_args()
    model = training.get_model(partial(model_provider, gpt_builder), ModelType.encoder_or_decoder, wrap_with_ddp=False)
    for name, module in model[0].named_modules():
        if extra_state and name.endswith(("q_layernorm", "k_layernorm", "final_layernorm")):
            module.__class__ = NormWithState
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.fill_(float("nan"))
    try:
        iteration, _ = training.load_checkpoint(model, None, None)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return Loaded(-1, None, {}, f"{type(error).__name__}: {error}")
    return Loaded(iteration, _logits(model[0].eval(), tokens), {name: getattr(args, name) for name in names})


def _logits(model: Any, tokens: Tensor) -> Tensor | None:
    """Through Megatron's schedule, hence on any pipeline."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    def forward_step(data_iterator: Any, model: Any) -> Any:
        return model(tokens, positions, None), lambda output, non_loss_data=True: output

    with torch.no_grad():
        store = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=None, model=model, num_microbatches=1,
            seq_length=tokens.shape[1], micro_batch_size=tokens.shape[0], forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
    if not store:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(store[0]) for _ in range(group.size())]
    torch.distributed.all_gather(shards, store[0].contiguous(), group=group)
    return torch.cat(shards, dim=-1)
