"""``OISD``: attaches the two losses to a Megatron model that is somebody else's.

oisd = OISD(config, model_chunks, tp_group=tp, pp_group=pp, dp_group=dp)
...
def forward_step(data_iterator, model):
    batch = next(data_iterator)
    with oisd.microbatch(model, loss_mask=batch.mask, advantages=batch.advantages):
        output = model(batch.tokens, batch.position_ids, None)
    return output, loss_func

with oisd.step(num_microbatches=m, num_sequences=n, num_tokens=t):
    forward_backward_func(forward_step_func=forward_step, ...)
optimizer.step()
oisd.sync()
log(oisd.metrics())
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.attention import attention_js, sampled_scores
from megatron_oisd.losses.js import lens_js
from megatron_oisd.losses.numerics import Group, all_reduce_sum_, group_size, upcast
from megatron_oisd.pipeline.channel import Channel, Part, open_channels
from megatron_oisd.pipeline.checks import check_model_config
from megatron_oisd.pipeline.inject import AttentionTap, HiddenTap
from megatron_oisd.pipeline.lens import Lens, output_weight
from megatron_oisd.pipeline.metrics import Metrics
from megatron_oisd.pipeline.microbatch import Microbatch, StepScale, make_microbatch
from megatron_oisd.pipeline.placement import find_placement, unwrap


@dataclass
class _Chunk:
    """One model chunk of this rank and the microbatches between its forward and its backward."""

    model: Any
    students: list[int]
    current: Microbatch | None = None
    waiting: deque[Microbatch] = field(default_factory=deque)
    forwarded: int = 0


class OISD:
    """OISD on this rank's model chunks, from construction until :meth:`detach`.

    Construction is collective: every rank of the job must construct, with the same ``config``.

    Args:
        config: what to add.
        model_chunks: the chunks the pipeline schedule is given, wrapped (DDP, Float16Module) or not.
        tp_group: tensor-model-parallel group; None for size 1.
        pp_group: pipeline-model-parallel group; None for size 1.
        dp_group: data-parallel group (with context parallel), over which Megatron averages; None for size 1.
        vocab_size: true vocabulary size. Rows beyond it are padding and excluded from the softmax; None: no padding.

    Raises:
        OISDError: a student layer outside ``1..L-1``, or a model option that cannot be supported; nothing is attached
            then.
    """

    def __init__(
        self,
        config: OISDConfig,
        model_chunks: Sequence[nn.Module],
        *,
        tp_group: Group = None,
        pp_group: Group = None,
        dp_group: Group = None,
        vocab_size: int | None = None,
    ) -> None:
        self.config = config
        self.tp_group, self.pp_group, self.dp_group = tp_group, pp_group, dp_group
        models = [unwrap(chunk) for chunk in model_chunks]
        self._model_config = models[0].config
        check_model_config(self._model_config, config, model_chunks)
        self._placement = find_placement(models, pp_group)
        config.validate_layers(self._placement.num_layers)
        if vocab_size is not None and vocab_size > models[0].vocab_size:
            raise OISDError(
                f"vocab_size is {vocab_size} but the model's unembedding has {models[0].vocab_size} rows: pass the "
                "vocabulary size that the model was made for"
            )

        stage = 0 if pp_group is None else pp_group.rank()
        self._is_last = stage == self._placement.last_stage
        self._student_stages = sorted({self._placement.stage_of[layer] for layer in config.layers})
        self._has_student = stage in self._student_stages
        self._chunks = [
            _Chunk(model, [n for n in (layer.layer_number for layer in model.decoder.layers) if n in config.layers])
            for model in models
        ]
        self._device = next(iter(models[0].parameters())).device
        self._step_number = -1
        self._scale: StepScale | None = None
        self._teachers: dict[int, list[Tensor]] = {}
        self._needed: dict[int, int] = {}
        self._fresh = False
        self._hooks: list[Any] = []
        self._attached = False
        self._finalize: Any = None
        self._original_finalize: Any = None
        self._channels: dict[int, Channel] = {}
        self._lens: Lens | None = None
        kinds = tuple(kind for kind in ("think", "attn") if getattr(config, f"lambda_{kind}") > 0)
        self._metrics = Metrics(kinds, config.layers, self._device)
        if not config.enabled:
            return
        if group_size(pp_group) > 1:
            assert pp_group is not None
            self._channels = open_channels(
                pp_group,
                last_stage=self._placement.last_stage,
                student_stages=self._student_stages,
                device=self._device,
            )
        if config.lambda_think > 0 and (self._has_student or self._is_last):
            self._lens = Lens(models, is_owner=self._is_last, tp_group=tp_group)
            self._valid_columns = self._count_valid_columns(vocab_size)
        self._remote_heads = self._find_remote_heads(models)
        self._hook_students()
        if self._is_last:
            self._hook_teacher()
        self._attached = True
        self._wrap_finalize()
        self.sync()

    # ------------------------------------------------------------------------------------------- public surface

    @contextmanager
    def step(
        self,
        *,
        num_microbatches: int,
        num_sequences: int | None = None,
        num_tokens: int | None = None,
        step: int | None = None,
    ) -> Iterator[None]:
        """Surround one ``forward_backward_func`` call, on every rank of the pipeline.

        Args:
            num_microbatches: microbatches of this rank, as passed to the schedule.
            num_sequences: sequences of the global batch (all microbatches and data-parallel ranks).
            num_tokens: response tokens of the global batch, as the loss function counts them for Megatron. Both are
                needed for ``aggregation="sequence"`` under ``calculate_per_token_loss``; without them means are taken
                per microbatch first, as Megatron does by default.
            step: number of the optimizer step, which seeds the sampled queries; give it where runs are resumed. None:
                steps are counted from 0 since attaching.

        Raises:
            OISDError: counts are missing, a microbatch that went forward never came back, or the last step's lens
                gradients did not reach their owner.
        """
        if not self.config.enabled:
            yield
            return
        if self._scale is not None:
            raise OISDError("OISD.step() was entered twice: leave the first step before the next")
        scale = StepScale(
            per_token_loss=bool(self._model_config.calculate_per_token_loss),
            num_microbatches=num_microbatches,
            data_parallel_size=group_size(self.dp_group),
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )
        scale.check(self.config.aggregation)
        if self._lens is not None and self._lens.has_gradients:
            raise OISDError(
                "the last step's lens gradients were never added to the final norm and the unembedding: set the model "
                "config's finalize_model_grads_func, or call OISD.reduce_head_gradients() before gradients are reduced"
            )
        self._wrap_finalize()
        if not self._fresh:
            self.sync()
        self._scale = scale
        self._step_number = self._step_number + 1 if step is None else step
        finished, metrics = False, self._metrics.snapshot()
        try:
            yield
            self._check_nothing_is_left()
            for channel in self._channels.values():
                channel.finish()
            finished = True
        finally:
            self._scale, self._fresh = None, False
            self._forget_step()
            if not finished:
                self._metrics.restore(metrics)
                if self._lens is not None:
                    self._lens.discard_gradients()

    @contextmanager
    def microbatch(
        self,
        model: nn.Module,
        *,
        loss_mask: Tensor,
        advantages: Tensor,
        sequence_ids: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Surround one forward of one chunk; on *every* stage, with the same mask and advantages.

        Without gradients (evaluation, old log-probabilities), in eval mode or outside :meth:`step` it does nothing.

        Args:
            model: the chunk that is run.
            loss_mask: ``[b, s]``, non-zero at t where the prediction made at t belongs to the response: the mask of the
                policy loss, aligned with the logits. On CPU it costs no device synchronisation.
            advantages: ``[b]`` or ``[b, s]``.
            sequence_ids: ``b`` integers naming the sequences in the global batch, which make the sampled queries
                independent of the layout; None: numbered by data-parallel rank and microbatch.
        """
        if not self.config.enabled or self._scale is None or not torch.is_grad_enabled() or not model.training:
            yield
            return
        chunk = self._find_chunk(model)
        if not chunk.students and not chunk.model.post_process:
            yield
            return
        rows, index = loss_mask.shape[0], chunk.forwarded
        if sequence_ids is None:
            rank = 0 if self.dp_group is None else self.dp_group.rank()
            first = (rank * self._scale.num_microbatches + index) * rows
            sequence_ids = range(first, first + rows)
        entry = make_microbatch(
            index, self.config, self._scale, loss_mask=loss_mask, advantages=advantages, step=self._step_number,
            sequence_ids=sequence_ids, device=self._device,
        )  # fmt: skip
        chunk.forwarded += 1
        for layer in chunk.students:
            if self.config.lambda_think > 0:
                entry.pending.add(("think", layer))
            if self.config.lambda_attn > 0:
                entry.pending.add(("attn", layer))
        if entry.pending:
            chunk.waiting.append(entry)
            self._expect_teacher(entry)
        chunk.current = entry
        try:
            yield
        finally:
            chunk.current = None
        if chunk.model.post_process:
            self._hand_over(entry)

    def sync(self) -> None:
        """Refresh the lens replicas from the last stage; after every optimizer step and after loading weights.

        Collective over the stages that take part. :meth:`step` makes up for a call that was left out.
        """
        if self._lens is not None:
            self._lens.refresh(self._channels, self._remote_heads)
        self._fresh = True

    def reduce_head_gradients(self) -> None:
        """Bring the lens gradients of norm and unembedding to the parameters that own them.

        Called by the wrapped ``config.finalize_model_grads_func``; call it yourself, on every rank and before the
        data-parallel reduction, where your loop finalizes gradients in another way.
        """
        if self._lens is not None and self.config.head_gradient and self.config.lambda_think > 0:
            self._lens.return_gradients(self._channels, self._remote_heads)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the steps since the last call, equal on all ranks; collective over all groups.

        ``oisd/think/layer_<l>`` and ``oisd/attn/layer_<l>`` are the losses (signed weights included), ``oisd/js/...``
        and ``oisd/attn_js/...`` the unweighted divergences in nats over the tokens with a non-zero weight.
        """
        if not self.config.enabled:
            return {}
        return self._metrics.reduce(tp_group=self.tp_group, pp_group=self.pp_group, dp_group=self.dp_group)

    def detach(self) -> None:
        """Remove every hook and give back what was wrapped; safe to call twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        # Somebody who wrapped it after us keeps their wrapper; ours inside it then only passes on.
        if self._finalize is not None and self._model_config.finalize_model_grads_func is self._finalize:
            self._model_config.finalize_model_grads_func = self._original_finalize
        self._finalize = self._original_finalize = None
        self._attached = False
        self._forget_step()
        for channel in self._channels.values():
            dist.destroy_process_group(channel.group)
        self._channels.clear()

    # ------------------------------------------------------------------------------------------- attaching

    def _count_valid_columns(self, vocab_size: int | None) -> int | None:
        assert self._lens is not None
        if vocab_size is None:
            return None
        rows = self._lens.head.shape[0]
        rank = 0 if self.tp_group is None else self.tp_group.rank()
        return min(max(vocab_size - rank * rows, 0), rows)

    def _find_remote_heads(self, models: list[Any]) -> dict[int, bool]:
        """By student stage: whether its lens needs the unembedding sent. Gathered, since only that stage can tell."""
        missing = self._has_student and not self._is_last and all(output_weight(model) is None for model in models)
        gathered = [missing]
        if group_size(self.pp_group) > 1:
            gathered = [False] * group_size(self.pp_group)
            dist.all_gather_object(gathered, missing, group=self.pp_group)
        return dict(enumerate(gathered))

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

    def _wrap_finalize(self) -> None:
        """Put :meth:`reduce_head_gradients` before Megatron's reduction; again at each step, as loops set it late."""
        original = self._model_config.finalize_model_grads_func
        wrapped = original
        while wrapped is not None:
            if wrapped is self._finalize:
                return
            wrapped = getattr(wrapped, "oisd_wraps", None)
        if original is None:
            return

        def finalize(*args: Any, **kwargs: Any) -> Any:
            if self._attached:
                self.reduce_head_gradients()
            return original(*args, **kwargs)

        finalize.oisd_wraps = original  # type: ignore[attr-defined]
        self._finalize, self._original_finalize = finalize, original
        self._model_config.finalize_model_grads_func = finalize

    # ------------------------------------------------------------------------------------------- forward

    def _find_chunk(self, model: nn.Module) -> _Chunk:
        inner = unwrap(model)
        for chunk in self._chunks:
            if chunk.model is inner:
                return chunk
        raise OISDError("microbatch() was given a model that OISD is not attached to: pass the schedule's own chunk")

    def _binding(self, chunk: _Chunk, tap: tuple[str, int]) -> Microbatch | None:
        """The microbatch that the layer is running for, or None where this run is not to be tapped."""
        if not torch.is_grad_enabled():
            return None
        if chunk.current is not None:
            return chunk.current
        if torch._C._current_graph_task_id() == -1:
            return None
        # Recomputation inside backward: microbatches come back in the order they went, so it is the oldest pending.
        return next((entry for entry in chunk.waiting if tap in entry.pending), None)

    def _after_student(self, chunk: _Chunk, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        entry = self._binding(chunk, ("think", layer))
        if entry is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        rows, slots = self._local_rows(entry, hidden)
        saved = hidden.detach().flatten(0, 1)[rows]
        tapped = HiddenTap.apply(hidden, saved, partial(self._add_think, chunk, layer, entry, rows, slots))
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

    def _after_student_attention(
        self, chunk: _Chunk, layer: int, module: Any, args: Any, kwargs: Any, output: Tensor
    ) -> Any:
        entry = self._binding(chunk, ("attn", layer))
        if entry is None:
            return None
        query, key = _query_and_key(args, kwargs)
        _check_shape(entry, *query.shape[:2])
        return AttentionTap.apply(output, query, key, partial(self._attn_gradients, chunk, layer, entry, module))

    def _after_final_norm(self, chunk: _Chunk, module: nn.Module, args: Any, output: Tensor) -> None:
        entry = chunk.current
        if entry is not None:
            rows, slots = self._local_rows(entry, output)
            entry.teacher_hidden = self._gather_rows(output.detach().flatten(0, 1)[rows], entry, slots)

    def _after_teacher_attention(self, chunk: _Chunk, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        entry = chunk.current
        if entry is not None:
            assert entry.sample is not None
            query, key = _query_and_key(args, kwargs)
            _check_shape(entry, *query.shape[:2])
            scores = sampled_scores(query.detach(), key.detach(), entry.sample, scale=_softmax_scale(module, query))
            entry.teacher_scores = scores.log_softmax(-1)

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

    # ------------------------------------------------------------------------------------------- teacher transport

    def _parts(self, entry: Microbatch) -> list[Part]:
        """What a teacher message holds; derived from the microbatch on both ends."""
        parts = []
        if self.config.lambda_attn > 0:
            assert entry.sample is not None
            queries, keys = entry.sample.keys.shape
            heads = self._model_config.num_attention_heads // group_size(self.tp_group)
            dtype = torch.float64 if self._model_config.params_dtype == torch.float64 else torch.float32
            parts.append(Part((queries, heads, keys), dtype))
        if self.config.lambda_think > 0:
            parts.append(Part((len(entry.tokens), self._model_config.hidden_size), self._model_config.params_dtype))
        return parts

    def _expect_teacher(self, entry: Microbatch) -> None:
        """Post the receive once for each microbatch; chunks of one rank share the message."""
        first = entry.index not in self._needed
        self._needed[entry.index] = self._needed.get(entry.index, 0) + 1
        if first and not self._is_last:
            next(iter(self._channels.values())).expect(entry.index, self._parts(entry), entry.fingerprint)

    def _hand_over(self, entry: Microbatch) -> None:
        """End of the last stage's forward: keep the teacher for students here, send it to those elsewhere."""
        pieces = []
        if self.config.lambda_attn > 0:
            pieces.append(entry.teacher_scores)
        if self.config.lambda_think > 0:
            pieces.append(entry.teacher_hidden)
        tensors = [piece for piece in pieces if piece is not None]
        if len(tensors) < len(pieces):
            raise OISDError(
                "the last stage ran inside OISD.microbatch() but the teacher's hooks did not fire: the final norm or "
                "the last layer's core_attention was bypassed (CUDA graphs or a fused schedule?); turn that option off"
            )
        entry.teacher_hidden = entry.teacher_scores = None
        for channel in self._channels.values():
            channel.send(entry.index, tensors, entry.fingerprint)
        if self._has_student:
            self._teachers[entry.index] = tensors

    def _teacher(self, entry: Microbatch) -> tuple[Tensor | None, Tensor | None]:
        """(attention log-probabilities, normed hidden states) of the last layer for this microbatch."""
        if self._is_last:
            tensors = list(self._teachers[entry.index])
        else:
            tensors = list(next(iter(self._channels.values())).receive(entry.index))
        scores = tensors.pop(0) if self.config.lambda_attn > 0 else None
        return scores, tensors.pop(0) if tensors else None

    def _done(self, chunk: _Chunk, entry: Microbatch, tap: tuple[str, int]) -> None:
        entry.pending.discard(tap)
        if entry.pending:
            return
        chunk.waiting.remove(entry)
        self._needed[entry.index] -= 1
        if self._needed[entry.index] == 0:
            self._teachers.pop(entry.index, None)
            for channel in self._channels.values():
                channel.forget(entry.index)

    # ------------------------------------------------------------------------------------------- backward

    def _loss_scale(self) -> Tensor | float:
        """fp16's gradient scale, which the upstream gradients carry already."""
        scale = self._model_config.grad_scale_func
        return 1.0 if scale is None else scale(torch.ones((), device=self._device))

    def _add_think(
        self, chunk: _Chunk, layer: int, entry: Microbatch, rows: Tensor, slots: Tensor | None, upstream: Tensor,
        saved: Tensor,
    ) -> Tensor:  # fmt: skip
        """Gradient of lambda * L_think with respect to the student's residual stream, added to ``upstream``."""
        assert self._lens is not None
        config, lens = self.config, self._lens
        _, teacher = self._teacher(entry)
        assert teacher is not None
        with torch.enable_grad():
            hidden = self._gather_rows(saved, entry, slots).detach().requires_grad_()
            normed = lens.norm(hidden)
        loss = lens_js(
            normed.detach(), teacher, lens.head.detach(),
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
        self, chunk: _Chunk, layer: int, entry: Microbatch, module: Any, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of lambda * L_attn with respect to the student's query and key; local to this rank's heads."""
        config = self.config
        teacher, _ = self._teacher(entry)
        assert teacher is not None
        assert entry.sample is not None
        with torch.enable_grad():
            query_leaf, key_leaf = query.detach().requires_grad_(), key.detach().requires_grad_()
            scores = sampled_scores(query_leaf, key_leaf, entry.sample, scale=_softmax_scale(module, query))
            divergence = attention_js(scores, teacher)
            values = divergence.sum(1) / self._model_config.num_attention_heads
            scale = config.lambda_attn / len(config.layers) * self._loss_scale()
            loss = (upcast(values) * entry.attn_coefficients).sum() * scale
        gradients = torch.autograd.grad(loss, [query_leaf, key_leaf])
        # Metrics divide by TP what every rank counts alike; here each rank holds the share of its own heads.
        whole = values.detach() * group_size(self.tp_group)
        signed = entry.attn_coefficients * entry.metric_factor
        self._metrics.add("attn", layer, whole, signed, entry.attn_shares, entry.metric_count)
        self._done(chunk, entry, ("attn", layer))
        return gradients[0], gradients[1]

    # ------------------------------------------------------------------------------------------- end of a step

    def _check_nothing_is_left(self) -> None:
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

    def _forget_step(self) -> None:
        for chunk in self._chunks:
            chunk.waiting.clear()
            chunk.current, chunk.forwarded = None, 0
        self._teachers.clear()
        self._needed.clear()
        for channel in self._channels.values():
            channel.clear()


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
