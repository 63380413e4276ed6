"""Carries the detached teacher from the last pipeline stage to the stages that own students.

One message for each (microbatch, student stage), on a two-rank process group of its own, so that nothing here can mix
with the pipeline's messages. The last stage posts the send in its forward and never waits for it there; the student's
stage posts the receive in its forward and waits in its backward, by when the message has long been announced: the
gradient that stage is working on was made by the last stage *after* the send.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_HEADER_WORDS = 4


@dataclass(frozen=True)
class Part:
    """Shape and dtype of one tensor in a message; both ends derive them from the microbatch."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, rounded up so that the next one is aligned."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // 8) * 8


class Channel:
    """A one-way lane from the last stage to one student stage.

    Args:
        group: process group of exactly these two ranks.
        source: global rank of the last stage.
        target: global rank of the student's stage.
        device: where buffers live.
    """

    def __init__(self, group: dist.ProcessGroup, *, source: int, target: int, device: torch.device) -> None:
        self.group, self.source, self.target, self.device = group, source, target, device
        self._sent: list[tuple[Any, Tensor]] = []
        self._expected: dict[int, tuple[Any, Tensor, list[Part]]] = {}
        self._received: dict[int, list[Tensor]] = {}
        self.bytes_sent = 0

    def send(self, index: int, tensors: list[Tensor]) -> None:
        """Post microbatch ``index``'s teacher; returns at once, the buffer is kept until :meth:`finish`."""
        parts = [Part(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        buffer = self._buffer(parts)
        buffer[: 8 * _HEADER_WORDS].view(torch.int64).copy_(_header(index, parts))
        for view, tensor in zip(_views(buffer, parts), tensors, strict=True):
            view.copy_(tensor)
        self._sent.append((dist.isend(buffer, self.target, group=self.group), buffer))
        self.bytes_sent += buffer.numel()

    def expect(self, index: int, parts: list[Part]) -> None:
        """Post the receive of microbatch ``index``; calls come in the order of the sends."""
        buffer = self._buffer(parts)
        self._expected[index] = (dist.irecv(buffer, self.source, group=self.group), buffer, parts)

    def receive(self, index: int) -> list[Tensor]:
        """Wait for microbatch ``index``'s teacher.

        Raises:
            RuntimeError: the message is not the one expected: mask, advantages or step differ between the stages.
        """
        if index not in self._received:
            work, buffer, parts = self._expected.pop(index)
            work.wait()
            header, expected = buffer[: 8 * _HEADER_WORDS].view(torch.int64).cpu(), _header(index, parts)
            if not torch.equal(header, expected):
                raise RuntimeError(
                    f"the teacher of microbatch {index} came with header {header.tolist()}, expected "
                    f"{expected.tolist()}: loss_mask and advantages must be the same on every pipeline stage"
                )
            self._received[index] = _views(buffer, parts)
        return self._received[index]

    def forget(self, index: int) -> None:
        """Drop microbatch ``index``'s teacher: no student needs it any more."""
        self._received.pop(index, None)

    def finish(self) -> None:
        """Wait for the posted sends and drop what is left: the end of a step."""
        for work, _ in self._sent:
            work.wait()
        self.clear()

    def clear(self) -> None:
        """Drop all state without waiting: after an error."""
        self._sent.clear()
        self._expected.clear()
        self._received.clear()

    def _buffer(self, parts: list[Part]) -> Tensor:
        size = 8 * _HEADER_WORDS + sum(part.num_bytes for part in parts)
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def _header(index: int, parts: list[Part]) -> Tensor:
    numbers = [math.prod(part.shape) for part in parts] + [0, 0]
    return torch.tensor([index, len(parts), *numbers[:2]], dtype=torch.int64)


def _views(buffer: Tensor, parts: list[Part]) -> list[Tensor]:
    views, offset = [], 8 * _HEADER_WORDS
    for part in parts:
        size = math.prod(part.shape) * part.dtype.itemsize
        views.append(buffer[offset : offset + size].view(part.dtype).view(part.shape))
        offset += part.num_bytes
    return views


def open_channels(
    pp_group: dist.ProcessGroup, *, last_stage: int, student_stages: list[int], device: torch.device
) -> dict[int, Channel]:
    """Make this rank's channels: all of them on the last stage, its own on a student stage, none elsewhere.

    Collective over all ranks of the job, since torch makes process groups that way; every rank makes every group.

    Returns:
        Channels by the student's pipeline rank.
    """
    mine = dist.get_process_group_ranks(pp_group)
    pipelines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, tuple(mine))
    here, channels = pp_group.rank(), {}
    for ranks in sorted(set(pipelines)):
        for stage in student_stages:
            if stage == last_stage:
                continue
            group = dist.new_group(sorted((ranks[stage], ranks[last_stage])))
            if ranks == tuple(mine) and here in (stage, last_stage):
                channels[stage] = Channel(group, source=ranks[last_stage], target=ranks[stage], device=device)
                # The backend may connect at its first message, waiting for the other rank: here both are surely there,
                # while in a forward pass the other may itself wait for this one.
                dist.broadcast(torch.zeros(1, device=device), src=ranks[last_stage], group=group)
    return channels
