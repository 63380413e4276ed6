"""The teacher of each microbatch: kept here, sent there, waited for, and forgotten when its last student is done.

Rows of hidden states and of top-k teachers are equal on all tensor-parallel ranks, so each rank sends its share of them
(:attr:`.microbatch.Microbatch.bounds`) and the student's stage puts them together: a pipeline link carries every row
once and not ``tp`` times. Logits and attention scores are sharded by vocabulary and heads already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.js import HiddenTeacher, LogitsTeacher, Teacher
from megatron_oisd.losses.js_topk import TopKTeacher
from megatron_oisd.losses.numerics import Group, gather_rows, group_rank, group_size
from megatron_oisd.pipeline.channel import Channel, Part
from megatron_oisd.pipeline.microbatch import Microbatch
from megatron_oisd.pipeline.placement import Source

_HOOKED = {"think": "the final norm or the output layer", "attn": "the last layer's core_attention"}


class TeacherExchange:
    """Hands teachers from the forward that makes them to the students' backward, on this rank or through a channel.

    Args:
        config: which losses are on.
        model_config: Megatron's configuration, for shapes and types.
        vocab_columns: columns of this rank's vocabulary shard.
        tp_group: tensor-parallel group.
        sources: the chunks that make teachers.
        channels: this rank's channels by (number of the source, student stage).
        stage: this rank's pipeline rank.
        has_student: whether students live here.
    """

    def __init__(
        self,
        config: OISDConfig,
        model_config: Any,
        *,
        vocab_columns: int,
        tp_group: Group,
        sources: list[Source],
        channels: dict[tuple[int, int], Channel],
        stage: int,
        has_student: bool,
    ) -> None:
        self.config, self._model_config, self._vocab_columns = config, model_config, vocab_columns
        self._tp_group, self._sources, self._stage = tp_group, sources, stage
        self.channels, self.has_student = channels, has_student
        self._source_of = {kind: number for number, source in enumerate(sources) for kind in source.kinds}
        self._teachers: dict[tuple[int, int], dict[str, list[Tensor]]] = {}
        self._whole: dict[int, Teacher] = {}
        self._needed: dict[int, int] = {}

    def _parts(self, entry: Microbatch, kind: str) -> list[Part]:
        """What this rank sends or receives of a teacher; derived from the microbatch on both ends."""
        model = self._model_config
        if kind == "attn":
            assert entry.sample is not None
            queries, keys = entry.sample.keys.shape
            heads = model.num_attention_heads // group_size(self._tp_group)
            dtype = torch.float64 if model.params_dtype == torch.float64 else torch.float32
            return [Part((queries, heads, keys), dtype)]
        share = entry.share(group_rank(self._tp_group))
        rows = share.stop - share.start
        if self.config.teacher_payload == "hidden":
            return [Part((rows, model.hidden_size), model.params_dtype)]
        if self.config.teacher_payload == "logits":
            return [Part((len(entry.tokens), self._vocab_columns), model.params_dtype)]
        dtype = torch.float64 if model.params_dtype == torch.float64 else torch.float32
        k = self.config.teacher_topk
        return [Part((rows, k), dtype), Part((rows, k), torch.int32)]

    # ------------------------------------------------------------------------------------------- students

    def expect(self, entry: Microbatch) -> None:
        """Announce a microbatch once; chunks of one rank share its teachers."""
        first = entry.index not in self._needed
        self._needed[entry.index] = self._needed.get(entry.index, 0) + 1
        if not first:
            return
        for number, source in enumerate(self._sources):
            if source.stage != self._stage:
                parts = [part for kind in source.kinds for part in self._parts(entry, kind)]
                self.channels[number, self._stage].expect(entry.index, parts, entry.fingerprint)

    def _tensors(self, entry: Microbatch, kind: str) -> list[Tensor]:
        number = self._source_of[kind]
        source = self._sources[number]
        if source.stage == self._stage:
            return self._teachers[number, entry.index][kind]
        received = list(self.channels[number, self._stage].receive(entry.index))
        for made in source.kinds:
            count = len(self._parts(entry, made))
            found, received = received[:count], received[count:]
            if made == kind:
                return found
        raise AssertionError(kind)

    def attention_teacher(self, entry: Microbatch) -> Tensor:
        """``[Q, np, K]`` attention log-probabilities of the last layer."""
        return self._tensors(entry, "attn")[0]

    def think_teacher(self, entry: Microbatch) -> Teacher:
        """The final distribution. Collectives: one all-gather over the tensor-parallel ranks, once a microbatch."""
        if entry.index not in self._whole:
            tensors = self._tensors(entry, "think")
            if self.config.teacher_payload == "logits":
                self._whole[entry.index] = LogitsTeacher(tensors[0])
            else:
                local = self._sources[self._source_of["think"]].stage == self._stage
                if not local or self._model_config.sequence_parallel:
                    tensors = [gather_rows(part, entry.bounds, self._tp_group) for part in tensors]
                if self.config.teacher_payload == "hidden":
                    self._whole[entry.index] = HiddenTeacher(tensors[0])
                else:
                    self._whole[entry.index] = TopKTeacher(tensors[0], tensors[1].long())
        return self._whole[entry.index]

    def release(self, entry: Microbatch) -> None:
        """One chunk's students are done with this microbatch; the last of them drops the teacher."""
        self._needed[entry.index] -= 1
        if self._needed[entry.index] > 0:
            return
        self._whole.pop(entry.index, None)
        for number in range(len(self._sources)):
            self._teachers.pop((number, entry.index), None)
            if (number, self._stage) in self.channels:
                self.channels[number, self._stage].forget(entry.index)

    # ------------------------------------------------------------------------------------------- teachers

    def hand_over(self, entry: Microbatch, source: Source) -> None:
        """End of the forward of a chunk that makes teachers: keep them for students here, send them to those elsewhere.

        ``entry.captured["think"]`` holds all rows of the hidden states or of the top-k teacher, or under sequence
        parallelism those of this rank.
        """
        for kind in source.kinds:
            if kind not in entry.captured:
                raise OISDError(
                    f"OISD.microbatch() ended but the teacher's hook did not fire: {_HOOKED[kind]} was bypassed (CUDA "
                    "graphs or a fused schedule?); turn that option off"
                )
        captured, entry.captured = entry.captured, {}
        number = self._sources.index(source)
        outgoing = [
            channel for (lane, stage), channel in self.channels.items() if lane == number and stage != self._stage
        ]
        if outgoing:
            tensors = [part for kind in source.kinds for part in self._outgoing(entry, kind, captured[kind])]
            for channel in outgoing:
                channel.send(entry.index, tensors, entry.fingerprint)
        if self.has_student:
            self._teachers[number, entry.index] = captured

    def _outgoing(self, entry: Microbatch, kind: str, tensors: list[Tensor]) -> list[Tensor]:
        whole = kind == "think" and self.config.teacher_payload != "logits" and not self._model_config.sequence_parallel
        return [tensor[entry.share(group_rank(self._tp_group))] for tensor in tensors] if whole else tensors

    def clear(self) -> None:
        """Forget everything: the step is over."""
        self._teachers.clear()
        self._whole.clear()
        self._needed.clear()
        for channel in self.channels.values():
            channel.clear()

    @property
    def held(self) -> list[int]:
        """Microbatches whose teacher is kept or still wanted; empty between steps."""
        return sorted({*(index for _, index in self._teachers), *self._whole, *self._needed})
