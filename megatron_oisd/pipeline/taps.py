"""The hooks: what is captured in forward, and the gradients that are injected in backward."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.attention import attention_alignment, teacher_log_probs
from megatron_oisd.losses.js import HiddenTeacher, lens_js
from megatron_oisd.losses.numerics import Group, all_reduce_sum_, group_size
from megatron_oisd.pipeline.exchange import TeacherExchange
from megatron_oisd.pipeline.inject import AttentionTap, HiddenTap
from megatron_oisd.pipeline.lens import Lens
from megatron_oisd.pipeline.metrics import Metrics
from megatron_oisd.pipeline.microbatch import Microbatch

# Sampled queries per chunk of the attention loss. One query's gathered keys are K * ng * d fp32 numbers: 256 kB for
# Qwen3-4B (64 * 8 * 128). A chunk's peak is about 3.4 times its gathered keys: near 30 MB there, and below 1 GB for 128
# MLA heads of 192 without tensor parallelism.
_CHUNK_QUERIES = 32


@dataclass
class Chunk:
    """One model chunk of this rank and the microbatches between its forward and its backward."""

    model: Any
    students: list[int]
    current: Microbatch | None = None
    waiting: deque[Microbatch] = field(default_factory=deque)
    forwarded: int = 0


class Taps:
    """Hooks on the student layers of this rank's chunks and, on the last stage, on what makes the teacher.

    Args:
        config: which losses, on which layers.
        model_config: Megatron's configuration.
        chunks: this rank's chunks.
        lens: final norm and unembedding as this stage sees them; None where no logit alignment takes place.
        valid_columns: rows of this rank's unembedding shard that are vocabulary; None: all.
        exchange: brings teachers to students.
        metrics: where divergences are counted.
        tp_group: tensor-parallel group.
    """

    def __init__(
        self,
        config: OISDConfig,
        model_config: Any,
        chunks: list[Chunk],
        *,
        lens: Lens | None,
        valid_columns: int | None,
        exchange: TeacherExchange,
        metrics: Metrics,
        tp_group: Group,
    ) -> None:
        self.config, self._model_config, self._chunks = config, model_config, chunks
        self._lens, self._valid_columns = lens, valid_columns
        self._exchange, self._metrics, self.tp_group = exchange, metrics, tp_group
        self._device = next(iter(chunks[0].model.parameters())).device
        self._hooks: list[Any] = []
        self._hook_students()
        if exchange.is_last:
            self._hook_teacher()

    def remove(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def check_nothing_is_left(self) -> None:
        """Raise :class:`OISDError` naming microbatches whose gradients were never injected."""
        left = [
            f"microbatch {entry.index} (" + ", ".join(f"{kind} of layer {n}" for kind, n in sorted(entry.pending)) + ")"
            for chunk in self._chunks
            for entry in chunk.waiting
        ]
        if left:
            raise OISDError(
                f"the step ended before OISD's gradients were injected for {'; '.join(left)}: every microbatch that "
                "goes forward with gradients inside microbatch() must also go backward"
            )

    def _hook_students(self) -> None:
        for chunk in self._chunks:
            for layer in chunk.model.decoder.layers:
                if layer.layer_number not in chunk.students:
                    continue
                if self.config.lambda_think > 0:
                    self._hooks.append(
                        layer.register_forward_hook(partial(self._after_student, chunk, layer.layer_number))
                    )
                if self.config.lambda_attn > 0:
                    self._hooks.append(
                        layer.self_attention.core_attention.register_forward_hook(
                            partial(self._after_student_attention, chunk, layer.layer_number), with_kwargs=True
                        )
                    )

    def _hook_teacher(self) -> None:
        chunk = next(chunk for chunk in self._chunks if chunk.model.post_process)
        if self.config.lambda_think > 0:
            norm = chunk.model.decoder.final_layernorm
            self._hooks.append(norm.register_forward_hook(partial(self._after_final_norm, chunk)))
        if self.config.lambda_attn > 0:
            layer = chunk.model.decoder.layers[-1]
            self._hooks.append(
                layer.self_attention.core_attention.register_forward_hook(
                    partial(self._after_teacher_attention, chunk), with_kwargs=True
                )
            )

    # ------------------------------------------------------------------------------------------- forward

    def _binding(self, chunk: Chunk, tap: tuple[str, int]) -> Microbatch | None:
        """The microbatch that the layer is running for, or None where this run is not to be tapped."""
        if not torch.is_grad_enabled():
            return None
        if chunk.current is not None:
            return chunk.current
        if torch._C._current_graph_task_id() == -1:
            return None
        # Recomputation inside backward: microbatches come back in the order they went, so it is the oldest pending.
        return next((entry for entry in chunk.waiting if tap in entry.pending), None)

    def _after_student(self, chunk: Chunk, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        entry = self._binding(chunk, ("think", layer))
        if entry is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        rows, slots = self._local_rows(entry, hidden)
        saved = hidden.detach().flatten(0, 1)[rows]
        tapped = HiddenTap.apply(hidden, saved, partial(self._add_think, chunk, layer, entry, rows, slots))
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

    def _after_student_attention(
        self, chunk: Chunk, layer: int, module: Any, args: Any, kwargs: Any, output: Tensor
    ) -> Any:
        entry = self._binding(chunk, ("attn", layer))
        if entry is None:
            return None
        query, key = _query_and_key(args, kwargs)
        _check_shape(entry, *query.shape[:2])
        return AttentionTap.apply(output, query, key, partial(self._attn_gradients, chunk, layer, entry, module))

    def _after_final_norm(self, chunk: Chunk, module: nn.Module, args: Any, output: Tensor) -> None:
        entry = chunk.current
        if entry is not None:
            rows, slots = self._local_rows(entry, output)
            entry.teacher_hidden = self._gather_rows(output.detach().flatten(0, 1)[rows], entry, slots)

    def _after_teacher_attention(self, chunk: Chunk, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        entry = chunk.current
        if entry is not None:
            assert entry.sample is not None
            query, key = _query_and_key(args, kwargs)
            _check_shape(entry, *query.shape[:2])
            entry.teacher_scores = teacher_log_probs(
                query, key, entry.sample, scale=_softmax_scale(module, query), chunk_queries=_CHUNK_QUERIES
            )

    def _local_rows(self, entry: Microbatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of the computed tokens in this rank's ``[s * b]`` hidden states, and where they stand among all N.

        Under sequence parallelism a rank holds ``s / TP`` positions; None means that it holds them all.
        """
        shards = group_size(self.tp_group) if self._model_config.sequence_parallel else 1
        _check_shape(entry, hidden.shape[0] * shards, hidden.shape[1])
        if shards == 1:
            return entry.tokens, None
        assert self.tp_group is not None
        size = entry.shape[0] * entry.shape[1] // self.tp_group.size()
        first = size * self.tp_group.rank()
        slots = ((entry.tokens >= first) & (entry.tokens < first + size)).nonzero().flatten()
        return entry.tokens[slots] - first, slots

    def _gather_rows(self, local: Tensor, entry: Microbatch, slots: Tensor | None) -> Tensor:
        """Bring all N selected rows together from the sequence-parallel shards; one all-reduce."""
        if slots is None:
            return local
        rows = local.new_zeros(len(entry.tokens), local.shape[-1])
        rows[slots] = local
        return all_reduce_sum_(rows, self.tp_group)

    # ------------------------------------------------------------------------------------------- backward

    def _loss_scale(self) -> Tensor | float:
        """fp16's gradient scale, which the upstream gradients carry already."""
        scale = self._model_config.grad_scale_func
        return 1.0 if scale is None else scale(torch.ones((), device=self._device))

    def _add_think(
        self, chunk: Chunk, layer: int, entry: Microbatch, rows: Tensor, slots: Tensor | None, upstream: Tensor,
        saved: Tensor,
    ) -> Tensor:  # fmt: skip
        """Gradient of lambda * L_think with respect to the student's residual stream, added to ``upstream``."""
        assert self._lens is not None
        config, lens = self.config, self._lens
        _, teacher = self._exchange.teacher(entry)
        assert teacher is not None
        with torch.enable_grad():
            hidden = self._gather_rows(saved, entry, slots).detach().requires_grad_()
            normed = lens.norm(hidden)
        loss = lens_js(
            normed.detach(), HiddenTeacher(teacher), lens.head.detach(),
            entry.coefficients * (config.lambda_think / len(config.layers) * self._loss_scale()),
            temperature=config.temperature, group=self.tp_group, chunk_tokens=config.chunk_tokens,
            valid_columns=self._valid_columns,
            head_gradient=lens.head_gradient_buffer() if config.head_gradient else None,
        )  # fmt: skip
        parameters = [p for p in lens.norm_parameters if p.requires_grad] if config.head_gradient else []
        gradients = torch.autograd.grad(normed, [hidden, *parameters], loss.hidden_gradient)
        if parameters:
            lens.add_norm_gradients(list(gradients[1:]))
        local = gradients[0] if slots is None else gradients[0][slots]
        total = upstream.clone()
        total.view(-1, total.shape[-1]).index_add_(0, rows, local.to(total.dtype))
        signed = entry.coefficients * entry.metric_factor
        self._metrics.add("think", layer, loss.values, signed, entry.shares, entry.metric_count)
        self._done(chunk, entry, ("think", layer))
        return total

    def _attn_gradients(
        self, chunk: Chunk, layer: int, entry: Microbatch, module: Any, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of lambda * L_attn with respect to the student's query and key; local to this rank's heads."""
        config = self.config
        teacher, _ = self._exchange.teacher(entry)
        assert teacher is not None
        assert entry.sample is not None
        loss = attention_alignment(
            query, key, teacher, entry.sample,
            entry.attn_coefficients * (config.lambda_attn / len(config.layers) * self._loss_scale()),
            scale=_softmax_scale(module, query), num_heads_total=self._model_config.num_attention_heads,
            chunk_queries=_CHUNK_QUERIES,
        )  # fmt: skip
        # Metrics divide by TP what every rank counts alike; here each rank holds the share of its own heads.
        whole = loss.values * group_size(self.tp_group)
        signed = entry.attn_coefficients * entry.metric_factor
        self._metrics.add("attn", layer, whole, signed, entry.attn_shares, entry.metric_count)
        self._done(chunk, entry, ("attn", layer))
        return loss.query_gradient, loss.key_gradient

    def _done(self, chunk: Chunk, entry: Microbatch, tap: tuple[str, int]) -> None:
        entry.pending.discard(tap)
        if not entry.pending:
            chunk.waiting.remove(entry)
            self._exchange.release(entry)


def _check_shape(entry: Microbatch, length: int, rows: int) -> None:
    if entry.shape != (length, rows):
        raise OISDError(
            f"loss_mask has shape {[entry.shape[1], entry.shape[0]]} but the model ran on tokens of shape "
            f"{[rows, length]}: pass the mask of this microbatch's own tokens"
        )


def _query_and_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if kwargs.get("packed_seq_params") is not None:
        raise OISDError(
            "packed sequences (packed_seq_params) are not supported with lambda_attn > 0: run unpacked microbatches or "
            "set lambda_attn=0"
        )
    query = args[0] if args else kwargs["query"]
    key = args[1] if len(args) > 1 else kwargs["key"]
    return query, key


def _softmax_scale(module: Any, query: Tensor) -> float:
    """The scale that this core attention applies to q k^T."""
    scale = getattr(module, "softmax_scale", None) or module.config.softmax_scale
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
