"""A tiny Qwen3 on one rank, or a stage of two, in the trained path: DistributedDataParallel, ``PolicyPass``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.pipeline.oisd import OISD
from megatron_oisd.rl.policy import ParallelGroups, PolicyLossConfig, PolicyMicrobatch, PolicyPass
from tests.helpers import layout
from tests.helpers.layout import VOCAB, Batch

CONFIG = OISDConfig(layers=(2,), attn_window=3, attn_global_keys=3)
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
Gradients = dict[str, Tensor]


@dataclass
class Model:
    """A tiny Qwen3 as Megatron's GPTModel, one chunk, wrapped as for training."""

    config: Any
    arguments: Any
    chunk: Any
    finalize: Any

    @property
    def bare(self) -> nn.Module:
        return self.chunk.module

    def attach(self, config: OISDConfig = CONFIG, **kwargs: Any) -> OISD:
        groups = ParallelGroups.from_megatron()
        kwargs.setdefault("vocab_size", VOCAB)
        return OISD(config, [self.chunk], tp_group=groups.tp, pp_group=groups.pp, dp_group=groups.dp, **kwargs)

    def zero(self) -> None:
        self.chunk.zero_grad_buffer()

    def gradients(self) -> Gradients:
        return {name: p.main_grad.clone() for name, p in self.bare.named_parameters()}

    def policy(self, oisd: OISD | None) -> PolicyPass:
        return PolicyPass([self.chunk], self.config, oisd, PolicyLossConfig(), ParallelGroups.from_megatron(), VOCAB)

    def train(self, oisd: OISD | None, batch: Batch) -> Gradients:
        """One update's gradients from zero."""
        self.zero()
        self.policy(oisd).gradients(
            microbatches_of(batch), num_sequences=len(batch.tokens), num_tokens=int(batch.mask.sum())
        )
        return self.gradients()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.chunk(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape), None)

    def hooks(self) -> list[str]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return [f"{name}.{kind}" for name, m in self.chunk.named_modules() for kind in kinds for _ in getattr(m, kind)]


def build(*, tied: bool = True, pp: int = 1, **overrides: Any) -> Model:
    """Needs Megatron's parallel groups."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megatron_oisd.convert.families import arguments_from_hf_config
    from megatron_oisd.convert.weights import load_hf_weights
    from megatron_oisd.runtime.model import build_model, transformer_config

    hf = layout.hf_model(tied)
    arguments = arguments_from_hf_config(hf.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    config = transformer_config(
        arguments, pipeline_parallel=pp, finalize_model_grads_func=finalize_model_grads, **overrides
    )
    (bare,) = build_model(arguments, config)
    load_hf_weights([bare], arguments, {name: p.detach() for name, p in hf.state_dict().items()})
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    chunk = DistributedDataParallel(config=config, ddp_config=ddp_config, module=bare)
    chunk.zero_grad_buffer()
    chunk.train()
    return Model(config, arguments, chunk, finalize_model_grads)


def microbatches_of(batch: Batch) -> list[PolicyMicrobatch]:
    return [
        PolicyMicrobatch(
            tokens=batch.tokens[i : i + 1], mask=batch.mask[i : i + 1], advantages=batch.advantages[i : i + 1],
            old_log_probs=batch.old_log_probs[i : i + 1], sequence_ids=[i],
        )
        for i in range(len(batch.tokens))
    ]  # fmt: skip


def differing(gradients: Gradients, expected: Gradients) -> list[str]:
    assert gradients.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(gradients[name], value)]


def held(oisd: OISD) -> list[Any]:
    """What an instance holds of microbatches; empty between steps."""
    left: list[Any] = [*(oisd._exchange.held if oisd._exchange else [])]
    for chunk in oisd._chunks:
        left += [
            *chunk.waiting,
            *([chunk.current] if chunk.current else []),
            *([chunk.forwarded] * (chunk.forwarded > 0)),
        ]
    return left
