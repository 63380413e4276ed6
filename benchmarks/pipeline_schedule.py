"""Discrete-event simulation of pipeline schedules: 1F1B and interleaved 1F1B, in Megatron-Core's order.

Durations come from :mod:`.pipeline_costs`. Stages and ranks are counted from 0. A *virtual stage*
``chunk * ranks + rank`` is a stage in layer order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

Operation = tuple[str, int, int]
"""("F" or "B", chunk, microbatch)."""


def order(ranks: int, rank: int, microbatches: int, chunks: int = 1) -> list[Operation]:
    """What a rank runs, as Megatron-Core does: warm-up forwards, then one forward and one backward, then backwards.

    Interleaved (``chunks`` > 1): ``microbatch_group_size_per_vp_stage`` is the number of ranks.
    """
    if chunks > 1 and microbatches % ranks:
        raise ValueError(f"microbatches is {microbatches}: expected a multiple of {ranks} ranks under interleaving")
    table = [
        (chunk, number)
        for first in range(0, microbatches, ranks)
        for chunk in range(chunks)
        for number in range(first, min(first + ranks, microbatches))
    ]
    forwards: list[Operation] = [("F", chunk, number) for chunk, number in table]
    backwards: list[Operation] = [("B", chunks - 1 - chunk, number) for chunk, number in table]
    warmup = ranks - rank - 1 if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    warmup = min(warmup, len(table))
    steady = [pair for both in zip(forwards[warmup:], backwards, strict=False) for pair in both]
    return forwards[:warmup] + steady + backwards[len(table) - warmup :]


@lru_cache(maxsize=64)
def _stages_in_order(ranks: int, rank: int, microbatches: int, chunks: int) -> list[Operation]:
    """The same with virtual stages in place of chunks."""
    return [(kind, chunk * ranks + rank, number) for kind, chunk, number in order(ranks, rank, microbatches, chunks)]


@dataclass(frozen=True)
class Teacher:
    """What ties the student's backward of a microbatch to the last stage's forward of it."""

    stage: int
    """Virtual stage of the student."""
    before: float = 0.0
    """Seconds of that stage's backward before the tap: the layers above the student."""
    transfer: float = 0.0
    """Seconds of a message; 0 on the last stage's own rank."""
    early: bool = False
    """Whether the transfer starts when the teacher exists, and not when the backward reaches the tap."""


@dataclass(frozen=True)
class Pipeline:
    """Durations in seconds, by virtual stage."""

    ranks: int
    microbatches: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    """The student's includes the lens."""
    hops: tuple[float, ...] = ()
    """Message from virtual stage i to i + 1, and the same back; empty: no time."""
    blocking: bool = False
    """Whether a send holds the sender."""
    teacher: Teacher | None = None


@dataclass
class Run:
    """What a simulation saw. ``spans`` maps (kind, virtual stage, microbatch) to start and end in seconds."""

    seconds: float
    busy: list[float]
    """Computing time of each rank."""
    spans: dict[Operation, tuple[float, float]]
    waited: float = 0.0
    """Seconds in which a student's backward waited because its teacher did not exist."""
    exposed: float = 0.0
    """Seconds in which it waited because its teacher was under way."""
    teachers: int = 0
    """Most teachers at a time between the last stage's forward and the end of the student's backward."""
    tapped: int = 0
    """Most microbatches at a time between the student's forward and backward."""

    @property
    def bubble(self) -> float:
        """Share of the ranks' time without computing."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


def simulate(pipe: Pipeline) -> Run:
    """Run every rank's operations in its own order, each as soon as what it needs has arrived.

    Raises:
        RuntimeError: the orders deadlock.
    """
    stages = len(pipe.forward)
    if stages % pipe.ranks:
        raise ValueError(f"{stages} virtual stages: expected a multiple of {pipe.ranks} ranks")
    ranks, last, teacher, count = pipe.ranks, stages - 1, pipe.teacher, pipe.microbatches
    todo = [_stages_in_order(ranks, rank, count, stages // ranks) for rank in range(ranks)]
    place, clock, busy = [0] * ranks, [0.0] * ranks, [0.0] * ranks
    hops = pipe.hops or (0.0,) * last
    arrived: dict[Operation, float] = {("F", 0, number): 0.0 for number in range(count)}  # input from another stage
    spans: dict[Operation, tuple[float, float]] = {}
    made, landed = [0.0] * count, [0.0] * count  # when a teacher exists; when it is there, if it is sent early
    channel = waited = exposed = 0.0
    progress = True
    while progress:
        progress = False
        for rank, operations in enumerate(todo):
            while place[rank] < len(operations):
                operation = kind, stage, number = operations[place[rank]]
                ready = arrived.get(operation)
                if ready is None:
                    break
                place[rank] += 1
                progress = True
                start = max(clock[rank], ready)
                work = pipe.forward[stage] if kind == "F" else pipe.backward[stage]
                stall = 0.0
                if kind == "B" and teacher is not None and stage == teacher.stage:
                    tap = start + teacher.before
                    if not teacher.early:
                        landed[number] = channel = max(tap, made[number], channel) + teacher.transfer
                    stall = max(0.0, landed[number] - tap)
                    missing = min(stall, max(0.0, made[number] - tap))
                    waited, exposed = waited + missing, exposed + stall - missing
                end = start + stall + work
                spans[operation] = (start, end)
                busy[rank] += work
                clock[rank] = end
                if kind == "F" and stage == last:
                    made[number] = arrived["B", last, number] = end
                    if teacher is not None and teacher.early:
                        landed[number] = channel = max(end, channel) + teacher.transfer
                elif kind == "F" or stage > 0:
                    step, hop = (1, hops[stage]) if kind == "F" else (-1, hops[stage - 1])
                    arrived[kind, stage + step, number] = end + hop
                    clock[rank] += hop if pipe.blocking else 0.0
    if len(spans) < 2 * stages * count:
        raise RuntimeError(f"deadlock: of {2 * stages * count} operations {len(spans)} ran")
    run = Run(max(end for _, end in spans.values()), busy, spans, waited, exposed)
    if teacher is not None:
        at, numbers = teacher.stage, range(pipe.microbatches)
        run.teachers = _most((made[n], spans["B", at, n][1]) for n in numbers)
        run.tapped = _most((spans["F", at, n][0], spans["B", at, n][1]) for n in numbers)
    return run


def _most(intervals: Iterable[tuple[float, float]]) -> int:
    """Most half-open intervals that hold at one time."""
    changes = sorted(change for start, end in intervals for change in ((start, 1), (end, -1)))
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
