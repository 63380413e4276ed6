"""Carries the detached teacher from the last pipeline stage to the stages that own students.

A header and a payload for each (microbatch, student stage), on a two-rank process group of its own, so that nothing
here can mix with the pipeline's messages. The last stage posts the sends in its forward and never waits for them there;
the student's stage receives in its backward, by when they have long been posted: the gradient that stage is working on
was made by the last stage *after* the send.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.errors import OISDError

_HEADER_WORDS = 6


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
        self._expected: deque[tuple[int, list[Part], int]] = deque()
        self._broken = False
        self._received: dict[int, list[Tensor]] = {}
        self.bytes_sent = 0

    def send(self, index: int, tensors: list[Tensor], fingerprint: int = 0) -> None:
        """Post microbatch ``index``'s teacher; returns at once, the buffers are kept until :meth:`finish`."""
        self.check()
        parts = [Part(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        buffer = self._buffer(parts)
        header = _header(index, parts, fingerprint).to(self.device)
        for view, tensor in zip(_views(buffer, parts), tensors, strict=True):
            view.copy_(tensor)
        # Two messages: a receiver that expects another size must find out before it posts a buffer of that size.
        for message in (header.view(torch.uint8), buffer):
            self._sent.append((dist.isend(message, self.target, group=self.group), message))
            self.bytes_sent += message.numel()

    def expect(self, index: int, parts: list[Part], fingerprint: int = 0) -> None:
        """Announce microbatch ``index``; calls come in the order of the sends."""
        self._expected.append((index, parts, fingerprint))

    def receive(self, index: int) -> list[Tensor]:
        """Wait for microbatch ``index``'s teacher.

        Raises:
            RuntimeError: the message is not the one expected: mask, advantages or step differ between the stages.
        """
        while index not in self._received:
            number, parts, fingerprint = self._expected.popleft()
            raw = torch.empty(8 * _HEADER_WORDS, dtype=torch.uint8, device=self.device)
            dist.recv(raw, self.source, group=self.group)
            header, expected = raw.view(torch.int64).cpu(), _header(number, parts, fingerprint)
            if not torch.equal(header, expected):
                raise RuntimeError(
                    f"the teacher of microbatch {number} came with header {header.tolist()}, expected "
                    f"{expected.tolist()}: loss_mask and advantages must be the same on every pipeline stage"
                )
            buffer = self._buffer(parts)
            dist.recv(buffer, self.source, group=self.group)
            self._received[number] = _views(buffer, parts)
        return self._received[index]

    def forget(self, index: int) -> None:
        """Drop microbatch ``index``'s teacher: no student needs it any more."""
        self._received.pop(index, None)

    def check(self) -> None:
        """Raise :class:`OISDError` where an abandoned message would be taken for the next one."""
        if self._broken:
            raise OISDError(
                "a step failed while a teacher was under way to its student's stage: construct OISD again on every rank"
            )

    def finish(self) -> None:
        """Wait for the posted sends and drop what is left: the end of a step."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        self.clear()

    def clear(self) -> None:
        """Drop all state without waiting: after an error."""
        self._broken = self._broken or bool(self._sent)
        self._sent.clear()
        self._expected.clear()
        self._received.clear()

    def _buffer(self, parts: list[Part]) -> Tensor:
        size = sum(part.num_bytes for part in parts)
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def _header(index: int, parts: list[Part], fingerprint: int) -> Tensor:
    numbers = [math.prod(part.shape) for part in parts] + [0, 0]
    layout = zlib.crc32(repr([(part.shape, str(part.dtype)) for part in parts]).encode())
    return torch.tensor([index, len(parts), *numbers[:2], layout, fingerprint], dtype=torch.int64)


def _views(buffer: Tensor, parts: list[Part]) -> list[Tensor]:
    views, offset = [], 0
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
