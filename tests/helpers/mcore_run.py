"""The model of ``mcore.py`` in a training loop as somebody else would write it.

Megatron's schedules, DistributedDataParallel, ``finalize_model_grads``, the public surface of OISD.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers.mcore import (
    LENGTH,
    VOCAB,
    Layout,
    Piece,
    Rollouts,
    build_chunks,
    fill,
    pieces,
    transformer,
)


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
