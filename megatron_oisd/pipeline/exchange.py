"""The teacher of each microbatch: kept here, sent there, waited for, and forgotten when its last student is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.numerics import Group, group_size
from megatron_oisd.pipeline.channel import Channel, Part
from megatron_oisd.pipeline.microbatch import Microbatch


class TeacherExchange:
    """Hands teachers from the last stage's forward to the students' backward, on this rank or through a channel.

    Args:
        config: which losses are on.
        model_config: Megatron's configuration, for shapes and types.
        tp_group: tensor-parallel group.
        channels: this rank's channels by student stage (see :func:`.channel.open_channels`).
        is_last: whether this rank makes the teachers.
        has_student: whether this rank uses them.
    """

    def __init__(
        self,
        config: OISDConfig,
        model_config: Any,
        *,
        tp_group: Group,
        channels: dict[int, Channel],
        is_last: bool,
        has_student: bool,
    ) -> None:
        self.config, self._model_config, self._tp_group = config, model_config, tp_group
        self.channels, self.is_last, self.has_student = channels, is_last, has_student
        self._teachers: dict[int, list[Tensor]] = {}
        self._needed: dict[int, int] = {}

    def _parts(self, entry: Microbatch) -> list[Part]:
        """What a teacher message holds; derived from the microbatch on both ends."""
        parts = []
        if self.config.lambda_attn > 0:
            assert entry.sample is not None
            queries, keys = entry.sample.keys.shape
            heads = self._model_config.num_attention_heads // group_size(self._tp_group)
            dtype = torch.float64 if self._model_config.params_dtype == torch.float64 else torch.float32
            parts.append(Part((queries, heads, keys), dtype))
        if self.config.lambda_think > 0:
            parts.append(Part((len(entry.tokens), self._model_config.hidden_size), self._model_config.params_dtype))
        return parts

    def expect(self, entry: Microbatch) -> None:
        """Post the receive once for each microbatch; chunks of one rank share the message."""
        first = entry.index not in self._needed
        self._needed[entry.index] = self._needed.get(entry.index, 0) + 1
        if first and not self.is_last:
            next(iter(self.channels.values())).expect(entry.index, self._parts(entry), entry.fingerprint)

    def hand_over(self, entry: Microbatch) -> None:
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
        for channel in self.channels.values():
            channel.send(entry.index, tensors, entry.fingerprint)
        if self.has_student:
            self._teachers[entry.index] = tensors

    def teacher(self, entry: Microbatch) -> tuple[Tensor | None, Tensor | None]:
        """(attention log-probabilities, normed hidden states) of the last layer for this microbatch."""
        if self.is_last:
            tensors = list(self._teachers[entry.index])
        else:
            tensors = list(next(iter(self.channels.values())).receive(entry.index))
        scores = tensors.pop(0) if self.config.lambda_attn > 0 else None
        return scores, tensors.pop(0) if tensors else None

    def release(self, entry: Microbatch) -> None:
        """One chunk's students are done with this microbatch; the last of them drops the teacher."""
        self._needed[entry.index] -= 1
        if self._needed[entry.index] == 0:
            self._teachers.pop(entry.index, None)
            for channel in self.channels.values():
                channel.forget(entry.index)

    def clear(self) -> None:
        """Forget everything: the step is over."""
        self._teachers.clear()
        self._needed.clear()
        for channel in self.channels.values():
            channel.clear()

    @property
    def held(self) -> list[int]:
        """Microbatches whose teacher is kept or still wanted; empty between steps."""
        return sorted({*self._teachers, *self._needed})
