"""Updates of a randomly initialised model on any layout, for the benchmarks of the pipeline: GRPO with or without OISD.

The path is the trainer's: Megatron's model, DistributedDataParallel, schedules and ``PolicyPass``. The rollouts are
random tokens; nothing is learnt and nothing needs to be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_oisd import OISD, OISDConfig
from megatron_oisd.rl.policy import ParallelGroups, PolicyLossConfig, PolicyMicrobatch, PolicyPass
from megatron_oisd.runtime import cpu, distributed
from megatron_oisd.runtime.model import ModelArguments, build_model, transformer_config


@dataclass(frozen=True)
class Shape:
    """A dense Qwen3-like model and the batch of one update on one data-parallel rank."""

    layers: int = 8
    hidden: int = 256
    ffn: int = 768
    heads: int = 8
    groups: int = 4
    head_dim: int = 32
    vocabulary: int = 8192
    prompt: int = 64
    response: int = 192
    microbatches: int = 4
    dtype: torch.dtype = torch.float32

    @classmethod
    def tiny(cls) -> Shape:
        """To try a benchmark in seconds."""
        return cls(
            layers=4, hidden=32, ffn=48, heads=2, groups=1, head_dim=16, vocabulary=128, prompt=4, response=12,
            microbatches=4,
        )  # fmt: skip

    @classmethod
    def qwen3_4b(cls, layers: int = 36) -> Shape:
        """Qwen3-4B, untied so that the head counts once wherever it stands; ``layers`` below 36 for a smaller GPU."""
        return cls(
            layers=layers, hidden=2560, ffn=9728, heads=32, groups=8, head_dim=128, vocabulary=151936, prompt=1024,
            response=3072, microbatches=4, dtype=torch.bfloat16,
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.prompt + self.response

    def flops(self) -> float:
        """Operations of one GRPO update of this rank's batch: matrix products, forward and backward."""
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups) + 3 * self.hidden * self.ffn
        attention = 2 * self.length * self.heads * self.head_dim / 2  # causal: half the keys on average
        per_token = 2 * (self.layers * (projections + attention) + self.vocabulary * self.hidden)
        return 3.0 * per_token * self.length * self.microbatches

    def lens_flops(self, students: int, *, head_gradient: bool = True) -> float:
        """Operations that logit alignment adds: its products of ``2 N V h``, hidden teacher."""
        products = 4 if head_gradient else 3
        return students * products * 2.0 * self.response * self.microbatches * self.vocabulary * self.hidden


class Updates:
    """A context in which one rank trains; without a launcher's environment it is a world of one."""

    def __init__(self, shape: Shape, *, tp: int = 1, pp: int = 1) -> None:
        self.shape, self._tp, self._pp = shape, tp, pp
        self.oisd: Any = None

    def __enter__(self) -> Updates:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.transformer.module import Float16Module

        shape = self.shape
        distributed.initialize(tensor_parallel=self._tp, pipeline_parallel=self._pp)
        self.arguments = ModelArguments(
            num_layers=shape.layers, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn,
            num_attention_heads=shape.heads, num_query_groups=shape.groups, kv_channels=shape.head_dim,
            vocab_size=shape.vocabulary, max_position_embeddings=shape.length, rotary_base=10000.0,
            layernorm_epsilon=1e-6, qk_layernorm=True, untie_embeddings_and_output_weights=True,
        )  # fmt: skip
        config = transformer_config(
            self.arguments, tensor_parallel=self._tp, pipeline_parallel=self._pp, dtype=shape.dtype,
            finalize_model_grads_func=finalize_model_grads,
        )  # fmt: skip
        bare = build_model(self.arguments, config)
        wrapped = bare if shape.dtype is torch.float32 else [Float16Module(config, chunk) for chunk in bare]
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        self.chunks = [DistributedDataParallel(config, ddp_config, chunk) for chunk in wrapped]
        if not cpu.is_installed():
            self.chunks = [chunk.cuda() for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.train()
        self.groups = ParallelGroups.from_megatron()
        self.policy = PolicyPass(
            self.chunks, config, None, PolicyLossConfig(), self.groups, self.arguments.vocab_size
        )  # fmt: skip
        self.batch = self._rollouts()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.oisd is not None:
            self.oisd.detach()
        distributed.shutdown()

    def _rollouts(self) -> list[PolicyMicrobatch]:
        shape, generator = self.shape, torch.Generator().manual_seed(0)
        device = next(self.chunks[0].parameters()).device
        mask = torch.zeros(1, shape.length, dtype=torch.bool)
        mask[:, shape.prompt - 1 : -1] = True
        return [
            PolicyMicrobatch(
                tokens=torch.randint(0, shape.vocabulary, (1, shape.length), generator=generator).to(device),
                mask=mask, advantages=torch.tensor([1.0 if number % 2 else -1.0]),
                old_log_probs=torch.full((1, shape.length), -9.0, device=device), sequence_ids=[number],
            )
            for number in range(shape.microbatches)
        ]  # fmt: skip

    def attach(self, config: OISDConfig) -> None:
        """Attach OISD, in the place of what was attached."""
        if self.oisd is not None:
            self.oisd.detach()
        self.oisd = OISD(
            config, self.chunks, tp_group=self.groups.tp, pp_group=self.groups.pp, dp_group=self.groups.dp,
            vocab_size=self.arguments.vocab_size,
        )  # fmt: skip

    def run(self, *, oisd: bool) -> None:
        """The gradients of one update and, with OISD, the refresh of its replicas."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.policy.oisd = self.oisd if oisd else None
        count = len(self.batch)
        tokens = sum(int(microbatch.mask.sum()) for microbatch in self.batch)
        self.policy.gradients(self.batch, num_sequences=count, num_tokens=tokens)
        if oisd:
            self.oisd.sync()

    def timed(self, *, oisd: bool) -> float:
        """Wall seconds of :meth:`run`, from when every rank is ready until every rank is done."""
        dist.barrier()
        start = time.perf_counter()
        self.run(oisd=oisd)
        if not cpu.is_installed():
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - start
