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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.numerics import Group, group_rank, group_size, valid_columns
from megatron_oisd.pipeline.channel import Channel, Traffic, in_flight, open_channels
from megatron_oisd.pipeline.checks import check_agreement, check_model, shared_sliding_window
from megatron_oisd.pipeline.exchange import TeacherExchange
from megatron_oisd.pipeline.lens import Lens, output_weight
from megatron_oisd.pipeline.metrics import Metrics
from megatron_oisd.pipeline.microbatch import Shards, StepScale, make_microbatch, packed_borders
from megatron_oisd.pipeline.overlap import HeldBuckets, gather_parameters
from megatron_oisd.pipeline.placement import Source, device_of, find_placement, unwrap
from megatron_oisd.pipeline.taps import Chunk, Taps
from megatron_oisd.pipeline.versions import check_megatron

# Room for the numbers of the sequences packed into one microbatch.
_PACKED_IDS = 1 << 20


class OISD:
    """OISD on this rank's model chunks, from construction until :meth:`detach`.

    Construction is collective: every rank of the job must construct, with the same ``config``.

    Args:
        config: what to add.
        model_chunks: the chunks the pipeline schedule is given, wrapped (DDP, Float16Module) or not.
        tp_group: tensor-model-parallel group; None for size 1.
        pp_group: pipeline-model-parallel group; None for size 1.
        dp_group: data-parallel group (with context parallel), over which Megatron averages; None for size 1.
        cp_group: context-parallel group; None for size 1.
        vocab_size: true vocabulary size. Rows beyond it are padding and excluded from the softmax; None: no padding.
        microbatches_in_flight: most microbatches between forward and backward on a student's stage; None: as in
            Megatron's own schedules. Only a schedule of another kind needs it.

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
        cp_group: Group = None,
        vocab_size: int | None = None,
        microbatches_in_flight: int | None = None,
    ) -> None:
        self.config = config
        self.tp_group, self.pp_group, self.dp_group, self.cp_group = tp_group, pp_group, dp_group, cp_group
        arguments = {"vocab_size": vocab_size, "microbatches_in_flight": microbatches_in_flight}
        check_agreement(asdict(config) | arguments, (pp_group, tp_group, dp_group))
        if config.enabled:
            ddp: list[Any] = [getattr(chunk, "ddp_config", None) for chunk in model_chunks]
            check_megatron(overlap=any(it and (it.overlap_grad_reduce or it.overlap_param_gather) for it in ddp))
        models = [unwrap(chunk) for chunk in model_chunks]
        self._model_config = models[0].config
        check_model(self._model_config, config, model_chunks, models, cp_size=group_size(cp_group))
        self._placement = placement = find_placement(models, pp_group)
        config.validate_layers(placement.num_layers)
        if vocab_size is not None and vocab_size > models[0].vocab_size:
            raise OISDError(
                f"vocab_size is {vocab_size} but the model's unembedding has {models[0].vocab_size} rows: pass the "
                "vocabulary size that the model was made for"
            )

        self._stage = group_rank(pp_group)
        self._student_stages = sorted({placement.stage_of[layer] for layer in config.layers})
        kinds = tuple(kind for kind in ("attn", "think") if getattr(config, f"lambda_{kind}") > 0)
        sources = placement.sources(kinds)
        self._chunks = [
            Chunk(
                model,
                [n for n in (layer.layer_number for layer in model.decoder.layers) if n in config.layers],
                next((source for source in sources if (source.stage, source.chunk) == (self._stage, number)), None),
            )
            for number, model in enumerate(models)
        ]
        self._device = device_of(models)
        self._shards = Shards(
            tensor_size=group_size(tp_group),
            tensor_rank=group_rank(tp_group),
            sequence_parallel=bool(self._model_config.sequence_parallel),
            context_size=group_size(cp_group),
            context_rank=group_rank(cp_group),
        )
        self._sliding_window = shared_sliding_window(self._model_config, (*config.layers, placement.num_layers))
        self._step_number = -1
        self._scale: StepScale | None = None
        self._fresh = self._attached = self._trains_head = False
        self._taps: Taps | None = None
        self._exchange: TeacherExchange | None = None
        self._finalize: Any = None
        self._original_finalize: Any = None
        self._channels: dict[tuple[int, int], Channel] = {}
        self._lens_channels: dict[int, Channel] = {}
        self._lens: Lens | None = None
        self._traffic = Traffic()
        self._metrics = Metrics(tuple(sorted(kinds, reverse=True)), config.layers, self._device, self._traffic)
        self._ddp_chunks = list(model_chunks)
        self._held = HeldBuckets((), ())
        if not config.enabled:
            return
        self._replica = self._name_replica()
        self._open_channels(sources, microbatches_in_flight)
        self._attach_lens(models)
        self._exchange = TeacherExchange(
            config,
            self._model_config,
            vocab_columns=models[0].vocab_size // group_size(tp_group),
            tp_group=tp_group,
            sources=sources,
            channels=self._channels,
            stage=self._stage,
            has_student=self._has_student,
        )
        self._taps = Taps(
            config,
            self._model_config,
            self._chunks,
            lens=self._lens,
            valid_columns=self._count_valid_columns(vocab_size),
            exchange=self._exchange,
            metrics=self._metrics,
            tp_group=tp_group,
            cp_group=cp_group,
            head_gradient=self._trains_head,
        )
        self._attached = True
        self.wrap_finalize()
        self.sync()
        self._traffic.read()  # counted from the first step on

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
            context_parallel_size=group_size(self.cp_group),
            num_sequences=num_sequences,
            num_tokens=num_tokens,
        )
        scale.check(self.config.aggregation)
        if self._lens is not None and self._lens.has_gradients:
            raise OISDError(
                "the last step's lens gradients were never added to the final norm and the unembedding: set the model "
                "config's finalize_model_grads_func, or call OISD.reduce_head_gradients() before gradients are reduced"
            )
        self.wrap_finalize()
        if not self._fresh:
            self.sync()
        self._scale = scale
        self._step_number = self._step_number + 1 if step is None else step
        finished, metrics = False, self._metrics.snapshot()
        if self._trains_head:
            self._held.hold()
        try:
            yield
            assert self._taps is not None
            self._taps.check_nothing_is_left()
            for channel in self._channels.values():
                channel.finish()
            self._metrics.count_step()
            finished = True
        finally:
            self._scale, self._fresh = None, False
            self._forget_step()
            if not finished:
                self._metrics.restore(metrics)
                self._held.drop()
                if self._lens is not None:
                    self._lens.discard_gradients()

    @contextmanager
    def microbatch(
        self,
        model: nn.Module,
        *,
        loss_mask: Tensor,
        advantages: Tensor,
        packed_seq_params: Any = None,
        sequence_ids: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Surround one forward of one chunk; on *every* stage, with the same mask and advantages.

        Without gradients (evaluation, old log-probabilities), in eval mode or outside :meth:`step` it does nothing.

        Args:
            model: the chunk that is run.
            loss_mask: ``[b, s]``, non-zero at t where the prediction made at t belongs to the response: the mask of the
                policy loss, aligned with the logits. On CPU it costs no device synchronisation. Under context
                parallelism that of the whole sequences, of which each rank holds its part.
            advantages: ``[b]`` or ``[b, s]``; packed: one for each sequence, or ``[1, t]``.
            packed_seq_params: Megatron's ``PackedSeqParams`` that the model is run with, where sequences are packed;
                None: every row is one sequence.
            sequence_ids: integers naming the sequences in the global batch, which make the sampled queries
                independent of the layout; None: numbered by data-parallel rank and microbatch.
        """
        if not self.config.enabled or self._scale is None or not torch.is_grad_enabled() or not model.training:
            yield
            return
        assert self._exchange is not None
        chunk = self._find_chunk(model)
        if not chunk.students and chunk.source is None:
            yield
            return
        index, borders = chunk.forwarded, None if packed_seq_params is None else packed_borders(packed_seq_params)
        number = self._replica * self._scale.num_microbatches + index
        entry = make_microbatch(
            index, self.config, self._scale, loss_mask=loss_mask, advantages=advantages, step=self._step_number,
            sequence_ids=sequence_ids, first_id=number * (len(loss_mask) if borders is None else _PACKED_IDS),
            device=self._device, shards=self._shards, borders=borders, sliding_window=self._sliding_window,
        )  # fmt: skip
        chunk.forwarded += 1
        for layer in chunk.students:
            if self.config.lambda_think > 0:
                entry.pending.add(("think", layer))
            if self.config.lambda_attn > 0:
                entry.pending.add(("attn", layer))
        if entry.pending:
            chunk.waiting.append(entry)
            self._exchange.expect(entry)
        chunk.current = entry
        try:
            yield
        finally:
            chunk.current = None
        if chunk.source is not None:
            self._exchange.hand_over(entry, chunk.source)

    def sync(self) -> None:
        """Refresh the lens replicas from the last stage; after every optimizer step and after loading weights.

        Collective over the stages that take part. :meth:`step` makes up for a call that was left out.
        """
        if self._lens is not None:
            counted = self._traffic.lens_bytes
            if self._lens.is_owner and self._lens_channels:
                gather_parameters(self._ddp_chunks, self._lens.owned)
            self._lens.refresh(self._lens_channels, self._remote_heads)
            if self._fresh:  # no step came before: loading weights is not the training's traffic
                self._traffic.lens_bytes = counted
        self._fresh = True

    def wrap_finalize(self) -> None:
        """Put :meth:`reduce_head_gradients` before ``config.finalize_model_grads_func``, unless it is there already.

        :meth:`step` does it on entering; call it where a loop sets the function inside the step.
        """
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

    def reduce_head_gradients(self) -> None:
        """Bring the lens gradients of norm and unembedding to the parameters that own them.

        Called by the wrapped ``config.finalize_model_grads_func``; call it yourself, on every rank and before the
        data-parallel reduction, where your loop finalizes gradients in another way.
        """
        if self._lens is not None and self._trains_head:
            self._lens.return_gradients(self._lens_channels, self._remote_heads)
            self._held.release()
        # As at the step's end: the students' backwards are over or will be without us. A step that is abandoned after
        # its schedule then leaves nothing under way.
        for channel in self._channels.values():
            channel.wait_for_sends()

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
        if self._taps is not None:
            self._taps.remove()
        # Somebody who wrapped it after us keeps their wrapper; ours inside it then only passes on.
        if self._finalize is not None and self._model_config.finalize_model_grads_func is self._finalize:
            self._model_config.finalize_model_grads_func = self._original_finalize
        self._finalize = self._original_finalize = None
        self._attached = False
        self._held.remove()
        self._forget_step()
        for channel in self._channels.values():
            for group in {channel.group, channel.control}:
                dist.destroy_process_group(group)
        self._channels.clear()
        self._lens_channels.clear()

    # ------------------------------------------------------------------------------------------- attaching

    @property
    def _has_student(self) -> bool:
        return self._stage in self._student_stages

    def _name_replica(self) -> int:
        """Number of this data-parallel replica, equal on its context-parallel ranks."""
        rank = group_rank(self.dp_group)
        ranks: list[Any] = [rank]
        if group_size(self.cp_group) > 1:
            ranks = [None] * group_size(self.cp_group)
            dist.all_gather_object(ranks, rank, group=self.cp_group)
        return min(ranks)

    def _open_channels(self, sources: list[Source], microbatches_in_flight: int | None) -> None:
        """Make the lanes from the chunks that make teachers to the students' stages."""
        stages = group_size(self.pp_group)
        if stages == 1:
            return
        assert self.pp_group is not None
        group = getattr(self._model_config, "microbatch_group_size_per_vp_stage", None)
        limits = {
            stage: microbatches_in_flight or in_flight(stages, stage, len(self._chunks), group, None)
            for stage in self._student_stages
        }
        lanes = [(number, stage) for number in range(len(sources)) for stage in self._student_stages]
        opened = open_channels(
            self.pp_group,
            lanes=[(sources[number].stage, stage) for number, stage in lanes],
            limits=limits,
            device=self._device,
            traffic=self._traffic,
        )
        self._channels = {lanes[at]: channel for (at, _), channel in opened.items()}
        think = next((number for number, source in enumerate(sources) if "think" in source.kinds), None)
        self._lens_channels = {stage: channel for (number, stage), channel in self._channels.items() if number == think}

    def _attach_lens(self, models: list[Any]) -> None:
        is_owner = self._stage == self._placement.head[0]
        if self.config.lambda_think > 0 and (self._has_student or is_owner):
            self._lens = Lens(models, is_owner=is_owner, tp_group=self.tp_group)
        # Only the student's stage can tell whether it needs the unembedding sent, only its owner whether it is trained.
        missing = self._has_student and not is_owner and all(output_weight(model) is None for model in models)
        trained = is_owner and self._lens is not None and self._lens.is_trained
        gathered: list[Any] = [(missing, trained)]
        if group_size(self.pp_group) > 1:
            gathered = [None] * group_size(self.pp_group)
            dist.all_gather_object(gathered, (missing, trained), group=self.pp_group)
        self._remote_heads = {stage: remote for stage, (remote, _) in enumerate(gathered)}
        self._trains_head = self.config.head_gradient and any(trained for _, trained in gathered)
        if self._trains_head and self._lens is not None:
            self._held = HeldBuckets(self._ddp_chunks, self._lens.owned)

    def _count_valid_columns(self, vocab_size: int | None) -> int | None:
        if vocab_size is None or self._lens is None:
            return None
        return valid_columns(vocab_size, self._shards.tensor_rank, self._lens.head.shape[0])

    # ------------------------------------------------------------------------------------------- forward

    def _find_chunk(self, model: nn.Module) -> Chunk:
        inner = unwrap(model)
        for chunk in self._chunks:
            if chunk.model is inner:
                return chunk
        raise OISDError("microbatch() was given a model that OISD is not attached to: pass the schedule's own chunk")

    # ------------------------------------------------------------------------------------------- end of a step

    def _forget_step(self) -> None:
        for chunk in self._chunks:
            chunk.waiting.clear()
            chunk.current, chunk.forwarded = None, 0
        if self._exchange is not None:
            self._exchange.clear()
