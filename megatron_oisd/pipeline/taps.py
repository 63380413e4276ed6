"""The hooks: what is captured in forward, and the gradients that are injected in backward."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.attention import attention_alignment, teacher_log_probs
from megatron_oisd.losses.js import lens_js
from megatron_oisd.losses.js_topk import make_topk_teacher
from megatron_oisd.losses.numerics import Group, all_reduce_sum_, gather_rows, group_rank, group_size, upcast
from megatron_oisd.pipeline.exchange import TeacherExchange
from megatron_oisd.pipeline.inject import AttentionTap, HiddenTap, anchor
from megatron_oisd.pipeline.lens import Lens
from megatron_oisd.pipeline.metrics import Metrics
from megatron_oisd.pipeline.microbatch import Microbatch
from megatron_oisd.pipeline.placement import Source, device_of


@dataclass
class Chunk:
    """One model chunk of this rank and the microbatches between its forward and its backward."""

    model: Any
    students: list[int]
    source: Source | None = None
    """Which teachers are made here."""
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
        cp_group: context-parallel group.
        head_gradient: whether norm and unembedding collect the lens gradient.
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
        cp_group: Group,
        head_gradient: bool,
    ) -> None:
        self.config, self._model_config, self._chunks = config, model_config, chunks
        self._lens, self._valid_columns, self._head_gradient = lens, valid_columns, head_gradient
        self._exchange, self._metrics, self.tp_group, self.cp_group = exchange, metrics, tp_group, cp_group
        self._device = device_of([chunk.model for chunk in chunks])
        self._hooks: list[Any] = []
        self._hook_students()
        for chunk in chunks:
            if chunk.source is not None:
                self._hook_teacher(chunk, chunk.source)

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
                        layer.register_forward_hook(
                            partial(self._after_student, chunk, layer.layer_number), with_kwargs=True
                        )
                    )
                if self.config.lambda_attn > 0:
                    self._hook_attention(layer, partial(self._after_student_attention, chunk, layer.layer_number))

    def _hook_teacher(self, chunk: Chunk, source: Source) -> None:
        if "think" in source.kinds and self.config.teacher_payload == "hidden":
            norm = chunk.model.decoder.final_layernorm
            self._hooks.append(norm.register_forward_hook(partial(self._after_final_norm, chunk)))
        elif "think" in source.kinds:
            head = chunk.model.output_layer
            self._hooks.append(head.register_forward_hook(partial(self._after_output_layer, chunk)))
        if "attn" in source.kinds:
            self._hook_attention(chunk.model.decoder.layers[-1], partial(self._after_teacher_attention, chunk))

    def _hook_attention(self, layer: Any, hook: Any) -> None:
        """``hook`` gets the softmax scale first: multi-latent attention alone knows its own."""
        attention = layer.self_attention
        scale = getattr(attention, "softmax_scale", None) if self._model_config.multi_latent_attention else None
        self._hooks.append(attention.core_attention.register_forward_hook(partial(hook, scale), with_kwargs=True))

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

    def _after_student(
        self, chunk: Chunk, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        entry = self._binding(chunk, ("think", layer))
        if entry is None:
            return None
        _check_packed(kwargs, entry)
        hidden = output[0] if isinstance(output, tuple) else output
        rows, mine = self._local_rows(entry, hidden)
        saved = hidden.detach().flatten(0, 1)[rows]
        tapped = HiddenTap.apply(
            hidden, saved, partial(self._add_think, chunk, layer, entry, rows, mine), anchor(hidden)
        )
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

    def _after_student_attention(
        self, chunk: Chunk, layer: int, scale: float | None, module: Any, args: Any, kwargs: Any, output: Tensor
    ) -> Any:
        entry = self._binding(chunk, ("attn", layer))
        if entry is None:
            return None
        query, key = _query_and_key(args, kwargs, entry)
        scale = _softmax_scale(module, query) if scale is None else scale
        return AttentionTap.apply(
            output, query, key, partial(self._attn_gradients, chunk, layer, entry, scale), anchor(output, query, key)
        )

    def _after_final_norm(self, chunk: Chunk, module: nn.Module, args: Any, output: Tensor) -> None:
        entry = chunk.current
        if entry is not None:
            rows, _ = self._local_rows(entry, output)
            entry.captured["think"] = [output.detach().flatten(0, 1)[rows]]

    def _after_output_layer(self, chunk: Chunk, module: nn.Module, args: Any, output: Any) -> None:
        """The last call counts: MTP heads use the output layer before the model's own logits are made."""
        entry = chunk.current
        if entry is None:
            return
        logits = (output[0] if isinstance(output, tuple) else output).detach()
        assert self._lens is not None
        columns = self._lens.head.shape[0]
        rank = group_rank(self.tp_group)
        if logits.shape[-1] != columns:  # gathered over the tensor-parallel ranks
            logits = logits[..., rank * columns : (rank + 1) * columns]
        _check_shape(entry, *logits.shape[:2])
        rows = logits.flatten(0, 1)[entry.tokens]
        if self.config.teacher_payload == "logits":
            entry.captured["think"] = [rows]
            return
        teacher = make_topk_teacher(
            rows, self.config.teacher_topk, temperature=self.config.temperature, group=self.tp_group,
            first_token=rank * columns, valid_columns=self._valid_columns,
        )  # fmt: skip
        share = entry.share(rank) if self._model_config.sequence_parallel else slice(None)
        entry.captured["think"] = [teacher.log_probs[share], teacher.token_ids[share].int()]

    def _after_teacher_attention(
        self, chunk: Chunk, scale: float | None, module: Any, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        entry = chunk.current
        if entry is None:
            return
        assert entry.sample is not None
        query, key = _query_and_key(args, kwargs, entry)
        scores = teacher_log_probs(
            _with_rows(query), self._whole_key(_with_rows(key), entry), entry.sample,
            scale=_softmax_scale(module, query) if scale is None else scale,
        )  # fmt: skip
        entry.captured["attn"] = [scores]

    def _local_rows(self, entry: Microbatch, hidden: Tensor) -> tuple[Tensor, slice]:
        """Rows of the computed tokens in this rank's ``[s * b]`` hidden states, and where they stand among all N.

        Under sequence parallelism a rank holds ``s / TP`` positions.
        """
        shards = group_size(self.tp_group) if self._model_config.sequence_parallel else 1
        _check_shape(entry, hidden.shape[0] * shards, hidden.shape[1])
        if shards == 1:
            return entry.tokens, slice(None)
        rank = group_rank(self.tp_group)
        mine = entry.share(rank)
        return entry.tokens[mine] - rank * hidden.shape[0] * hidden.shape[1], mine

    def _whole_key(self, key: Tensor, entry: Microbatch) -> Tensor:
        """``[s, b, ng, d]`` from the context-parallel ranks' ``[s_local, b, ng, d]``; one all-gather."""
        if entry.context_order is None:
            return key
        assert self.cp_group is not None
        everything = key.new_empty(key.shape[0] * self.cp_group.size(), *key.shape[1:])
        dist.all_gather_into_tensor(everything, key.detach().contiguous(), group=self.cp_group)
        return everything[entry.context_order]

    def _own_key(self, gradient: Tensor, entry: Microbatch) -> Tensor:
        """This context-parallel rank's part of the sum of all ranks' key gradients; one all-reduce."""
        if entry.context_order is None:
            return gradient
        assert self.cp_group is not None
        rank, size = self.cp_group.rank(), entry.shape[0]
        total = all_reduce_sum_(upcast(gradient), self.cp_group)
        everything = torch.empty_like(total)
        everything[entry.context_order] = total
        return everything[rank * size : (rank + 1) * size].to(gradient.dtype)

    # ------------------------------------------------------------------------------------------- backward

    def _loss_scale(self) -> Tensor | float:
        """fp16's gradient scale, which the upstream gradients carry already."""
        scale = self._model_config.grad_scale_func
        return 1.0 if scale is None else scale(torch.ones((), device=self._device))

    def _add_think(
        self, chunk: Chunk, layer: int, entry: Microbatch, rows: Tensor, mine: slice, upstream: Tensor, saved: Tensor
    ) -> Tensor:
        """Gradient of lambda * L_think with respect to the student's residual stream, added to ``upstream``."""
        assert self._lens is not None
        config, lens = self.config, self._lens
        teacher = self._exchange.think_teacher(entry)
        with torch.enable_grad():
            whole = gather_rows(saved, entry.bounds, self.tp_group) if self._model_config.sequence_parallel else saved
            hidden = whole.detach().requires_grad_()
            normed = lens.norm(hidden)
        width = lens.head.shape[0]
        loss = lens_js(
            normed.detach(), teacher, lens.head.detach(),
            entry.coefficients * (config.lambda_think / len(config.layers) * self._loss_scale()),
            temperature=config.temperature, group=self.tp_group, chunk_tokens=config.chunk_tokens,
            valid_columns=self._valid_columns, first_token=group_rank(self.tp_group) * width,
            head_gradient=lens.head_gradient_buffer() if self._head_gradient else None,
        )  # fmt: skip
        parameters = [p for p in lens.norm_parameters if p.requires_grad] if self._head_gradient else []
        gradients = torch.autograd.grad(normed, [hidden, *parameters], loss.hidden_gradient)
        if parameters:
            lens.add_norm_gradients(list(gradients[1:]))
        total = upstream.clone()
        total.view(-1, total.shape[-1]).index_add_(0, rows, gradients[0][mine].to(total.dtype))
        signed = entry.coefficients * entry.metric_factor
        self._metrics.add("think", layer, loss.values, signed, entry.shares, entry.metric_count)
        self._done(chunk, entry, ("think", layer))
        return total

    def _attn_gradients(
        self, chunk: Chunk, layer: int, entry: Microbatch, scale: float, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of lambda * L_attn with respect to the student's query and key; local to this rank's heads."""
        config = self.config
        assert entry.sample is not None
        loss = attention_alignment(
            _with_rows(query), self._whole_key(_with_rows(key), entry), self._exchange.attention_teacher(entry),
            entry.sample, entry.attn_coefficients * (config.lambda_attn / len(config.layers) * self._loss_scale()),
            scale=scale, num_heads_total=self._model_config.num_attention_heads,
        )  # fmt: skip
        # Metrics divide by TP what every rank counts alike; here each rank holds the share of its own heads.
        whole = loss.values * group_size(self.tp_group)
        signed = entry.attn_coefficients * entry.metric_factor
        self._metrics.add("attn", layer, whole, signed, entry.attn_shares, entry.metric_count)
        self._done(chunk, entry, ("attn", layer))
        return loss.query_gradient.view(query.shape), self._own_key(loss.key_gradient, entry).view(key.shape)

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


def _check_packed(kwargs: dict[str, Any], entry: Microbatch) -> None:
    """Sequences that only one side knows to be packed would be one sequence to the other, with other means."""
    if "packed_seq_params" in kwargs and (kwargs["packed_seq_params"] is not None) != entry.packed:
        raise OISDError(
            f"the model ran {'without' if entry.packed else 'with'} packed_seq_params but OISD.microbatch() was called "
            f"{'with' if entry.packed else 'without'} it: pass the same packed_seq_params to both"
        )


def _query_and_key(args: tuple[Any, ...], kwargs: dict[str, Any], entry: Microbatch) -> tuple[Tensor, Tensor]:
    """What core attention was given: ``[s, b, heads, d]``, packed ``[t, heads, d]``."""
    _check_packed(kwargs, entry)
    query = args[0] if args else kwargs["query"]
    key = args[1] if len(args) > 1 else kwargs["key"]
    _check_shape(entry, *_with_rows(query).shape[:2])
    return query, key


def _with_rows(tensor: Tensor) -> Tensor:
    """``[t, heads, d]`` as ``[t, 1, heads, d]``."""
    return tensor.unsqueeze(1) if tensor.dim() == 3 else tensor


def _softmax_scale(module: Any, query: Tensor) -> float:
    """The scale that this core attention applies to q k^T."""
    scale = getattr(module, "softmax_scale", None) or getattr(module.config, "softmax_scale", None)
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
