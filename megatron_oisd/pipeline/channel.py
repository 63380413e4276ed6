"""Carries the detached teacher from the stage that makes it to the stages that own students.

A header and a payload for each (microbatch, student stage), on a two-rank process group of its own, so that nothing
here can mix with the pipeline's messages. The source posts the sends in its forward and does not wait for them there;
the student's stage receives in its backward, by when they have long been posted: the gradient that stage is working on
was made by the last stage *after* the send.

Headers travel between the hosts (over gloo, also where payloads go over NCCL), so that checking them stops no GPU.
Buffers are reused: the source holds at most as many as there are microbatches between a student's forward and backward
(:func:`in_flight`), the target those of the microbatches it is working on.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.errors import OISDError

_HEADER_WORDS = 5


@dataclass(frozen=True)
class Part:
    """Shape and dtype of one tensor in a message; both ends derive them from the microbatch."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, rounded up so that the next one is aligned."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // 8) * 8


@dataclass
class Traffic:
    """What a rank sent and how long it waited, until it is read."""

    teacher_bytes: int = 0
    """Headers and payloads sent."""
    lens_bytes: int = 0
    """Lens replicas and their gradients sent, see :mod:`.lens`."""
    wait_s: float = 0.0
    """Seconds that backward waited for a teacher: the host's on CPU, the stream's on CUDA."""
    most_buffers: int = 0
    """Most send buffers that one channel held at one time."""
    _events: list[tuple[Any, Any]] = field(default_factory=list)

    def read(self) -> Traffic:
        """Return the totals and start anew; waits for CUDA events that are still to come."""
        for start, stop in self._events:
            stop.synchronize()
            self.wait_s += start.elapsed_time(stop) / 1000
        self._events.clear()
        result = Traffic(self.teacher_bytes, self.lens_bytes, self.wait_s, self.most_buffers)
        self.teacher_bytes = self.lens_bytes = self.most_buffers = 0
        self.wait_s = 0.0
        return result


class _Buffers:
    """Byte buffers that are given back and taken again."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._free = device, list[Tensor]()

    def take(self, size: int) -> Tensor:
        """A buffer of at least ``size`` bytes: the smallest that fits, else a new one in the place of a free one."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= size]
        chosen = min(fitting, key=torch.Tensor.numel) if fitting else None
        if chosen is None:
            if self._free:
                self._free.pop()
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        self._free = [buffer for buffer in self._free if buffer is not chosen]
        return chosen

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)


class Channel:
    """A one-way lane from a stage that makes teachers to one student stage.

    Args:
        group: process group of exactly these two ranks, for payloads.
        control: likewise for headers: a gloo group, the same one where ``group`` is gloo.
        source: global rank that makes the teacher.
        target: global rank of the student's stage.
        device: where payloads live.
        limit: messages that may be under way at one time, from :func:`in_flight`.
        traffic: the rank's counter.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        source: int,
        target: int,
        device: torch.device,
        limit: int,
        control: dist.ProcessGroup | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.group, self.source, self.target, self.device = group, source, target, device
        self.control, self.limit = control or group, limit
        self.traffic = traffic if traffic is not None else Traffic()
        self._sent: deque[tuple[list[Any], Tensor, Tensor]] = deque()
        self._buffers = _Buffers(device)
        self._expected: deque[tuple[int, list[Part], int]] = deque()
        self._broken = False
        self._received: dict[int, tuple[Tensor, list[Tensor]]] = {}

    # ------------------------------------------------------------------------------------------- source

    def send(self, index: int, tensors: list[Tensor], fingerprint: int = 0) -> None:
        """Post microbatch ``index``'s teacher.

        Returns at once unless ``limit`` messages are under way: then the oldest is waited for, which its student has
        received already in every schedule of Megatron's (see :func:`in_flight`).
        """
        self.check()
        # Gloo never calls a send completed before it is waited for, NCCL does.
        while self._sent and (len(self._sent) >= self.limit or all(work.is_completed() for work in self._sent[0][0])):
            self._finish_oldest()
        parts = [Part(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        buffer = self._buffers.take(_size(parts))
        header = _header(index, parts, fingerprint)
        for view, tensor in zip(_views(buffer, parts), tensors, strict=True):
            view.copy_(tensor)
        # Two messages: a receiver that expects another size must find out before it posts a buffer of that size.
        works = [dist.isend(header, self.target, group=self.control)]
        if _size(parts):
            works.append(dist.isend(buffer[: _size(parts)], self.target, group=self.group))
        self._sent.append((works, header, buffer))
        self.traffic.teacher_bytes += header.nbytes + _size(parts)
        self.traffic.most_buffers = max(self.traffic.most_buffers, len(self._sent))

    def _finish_oldest(self) -> None:
        works, _, buffer = self._sent.popleft()
        for work in works:
            work.wait()
        self._buffers.give_back(buffer)

    # ------------------------------------------------------------------------------------------- target

    def expect(self, index: int, parts: list[Part], fingerprint: int = 0) -> None:
        """Announce microbatch ``index``; calls come in the order of the sends.

        Raises:
            OISDError: more microbatches are under way than the source allows for, so that both would wait for ever.
        """
        if len(self._expected) >= self.limit:
            raise OISDError(
                f"{len(self._expected) + 1} microbatches are between forward and backward on this stage, where "
                f"Megatron's schedules leave {self.limit} at most: pass OISD(..., microbatches_in_flight=N) for a "
                "schedule of your own, N the microbatches of a step if in doubt"
            )
        self._expected.append((index, parts, fingerprint))

    def receive(self, index: int) -> list[Tensor]:
        """Wait for microbatch ``index``'s teacher.

        Raises:
            RuntimeError: the message is not the one expected: mask, advantages or step differ between the stages.
        """
        while index not in self._received:
            number, parts, fingerprint = self._expected.popleft()
            began = time.perf_counter()
            header, expected = torch.empty(_HEADER_WORDS, dtype=torch.int64), _header(number, parts, fingerprint)
            dist.recv(header, self.source, group=self.control)
            if not torch.equal(header, expected):
                raise RuntimeError(
                    f"the teacher of microbatch {number} came with header {header.tolist()}, expected "
                    f"{expected.tolist()}: loss_mask and advantages must be the same on every pipeline stage"
                )
            buffer = self._buffers.take(_size(parts))
            if _size(parts):
                work = dist.irecv(buffer[: _size(parts)], self.source, group=self.group)
                assert work is not None
                self._wait(work)
            self.traffic.wait_s += time.perf_counter() - began
            self._received[number] = buffer, _views(buffer, parts)
        return self._received[index][1]

    def _wait(self, work: Any) -> None:
        if self.device.type != "cuda":
            work.wait()
            return
        # On CUDA wait() holds the stream and not the host: the stream's own clock tells how long.
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work.wait()
        stop.record()
        self.traffic._events.append((start, stop))

    def forget(self, index: int) -> None:
        """Drop microbatch ``index``'s teacher: no student needs it any more."""
        received = self._received.pop(index, None)
        if received is not None:
            self._buffers.give_back(received[0])

    # ------------------------------------------------------------------------------------------- both

    def check(self) -> None:
        """Raise :class:`OISDError` where an abandoned message would be taken for the next one."""
        if self._broken:
            raise OISDError(
                "a step failed while a teacher was under way to its student's stage: right after a step is abandoned, "
                "detach OISD and construct it again on every rank"
            )

    def finish(self) -> None:
        """Wait for the posted sends and drop what is left: the end of a step."""
        self.wait_for_sends()
        self.clear()

    def wait_for_sends(self) -> None:
        """Wait until every posted message has been received."""
        while self._sent:
            self._finish_oldest()

    def clear(self) -> None:
        """Drop all state without waiting: after an error."""
        self._broken = self._broken or bool(self._sent)
        self._sent.clear()
        self._expected.clear()
        for index in list(self._received):
            self.forget(index)

    def move(self, tensor: Tensor, *, towards_student: bool) -> None:
        """Send or receive a lens tensor on this lane, whole and waited for; outside a step's schedule."""
        self.check()
        sender, receiver = (self.source, self.target) if towards_student else (self.target, self.source)
        if dist.get_rank() == sender:
            dist.send(tensor.contiguous(), receiver, group=self.group)
            self.traffic.lens_bytes += tensor.nbytes
        else:
            dist.recv(tensor, sender, group=self.group)


def in_flight(stages: int, stage: int, chunks: int, group_size: int | None, num_microbatches: int | None) -> int:
    """Most microbatches that are between forward and backward on one chunk of a stage, over Megatron's schedules.

    1F1B: stage s runs ``P - s`` forwards before its first backward and then alternates. Interleaved with v chunks:
    ``2 (P - s - 1) + (v - 1) g`` forwards of any chunk come first, g at a time of one chunk, and every g consecutive
    ones stay together; the bound is what of those can be of one chunk.

    Args:
        stages: P.
        stage: s, from 0.
        chunks: v.
        group_size: g, Megatron's ``microbatch_group_size_per_vp_stage``; None: P.
        num_microbatches: of a step, where known: never more than these.
    """
    if chunks == 1:
        bound = stages - stage
    else:
        group = group_size or stages
        warmup = 2 * (stages - stage - 1) + (chunks - 1) * group + 1
        bound = (-(-warmup // (group * chunks)) + 1) * group
    return bound if num_microbatches is None else max(1, min(bound, num_microbatches))


def _size(parts: list[Part]) -> int:
    return sum(part.num_bytes for part in parts)


def _header(index: int, parts: list[Part], fingerprint: int) -> Tensor:
    layout = zlib.crc32(repr([(part.shape, str(part.dtype)) for part in parts]).encode())
    return torch.tensor([index, len(parts), _size(parts), layout, fingerprint], dtype=torch.int64)


def _views(buffer: Tensor, parts: list[Part]) -> list[Tensor]:
    views, offset = [], 0
    for part in parts:
        size = math.prod(part.shape) * part.dtype.itemsize
        views.append(buffer[offset : offset + size].view(part.dtype).view(part.shape))
        offset += part.num_bytes
    return views


def _timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """The group's timeout, which a stage that waits on a lane beside it shall share; None: torch's default.

    Torch has no public way to ask; where its private one is gone the default holds.
    """
    try:
        options: Any = group._get_backend(device).options
        return options._timeout
    except (AttributeError, RuntimeError):
        return None


def open_channels(
    pp_group: dist.ProcessGroup,
    *,
    lanes: list[tuple[int, int]],
    limits: dict[int, int],
    device: torch.device,
    traffic: Traffic,
) -> dict[tuple[int, int], Channel]:
    """Make this rank's channels: those lanes that begin or end here.

    Collective over all ranks of the job, since torch makes process groups that way; every rank makes every group.

    Args:
        pp_group: this rank's pipeline.
        lanes: (stage that makes the teacher, student stage), the same list on every rank; where both are equal nothing
            travels and nothing is made. The same pair may stand there twice, for two kinds of teacher.
        limits: messages under way at most, by student stage.
        device: of the model.
        traffic: the rank's counter.

    Returns:
        Channels by (number of the lane, student stage).
    """
    mine = dist.get_process_group_ranks(pp_group)
    pipelines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, tuple(mine))
    here, channels = pp_group.rank(), {}
    timeout = _timeout(pp_group, device)
    for ranks in sorted(set(pipelines)):
        for number, (source, target) in enumerate(lanes):
            if source == target:
                continue
            pair = sorted((ranks[source], ranks[target]))
            group = dist.new_group(pair, timeout=timeout)
            # Asked of the default group: a rank outside the new one cannot ask it, and all must decide alike.
            control = None if dist.get_backend() == "gloo" else dist.new_group(pair, backend="gloo", timeout=timeout)
            if ranks == tuple(mine) and here in (source, target):
                channels[number, target] = Channel(
                    group, control=control, source=ranks[source], target=ranks[target], device=device,
                    limit=limits[target], traffic=traffic,
                )  # fmt: skip
                # The backend may connect at its first message, waiting for the other rank: here both are surely there,
                # while in a forward pass the other may itself wait for this one.
                dist.broadcast(torch.zeros(1, device=device), src=ranks[source], group=group)
    return channels
