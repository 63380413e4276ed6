"""The teacher's lane between two stages: order, sizes, dtypes, and the message for stages that disagree.

Every scenario runs on one pair of gloo ranks; rank 1 is the last stage and sends, rank 0 owns the student.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline.channel import Channel, Part, Traffic, in_flight, open_channels
from tests.helpers.ranks import run_ranks

SHAPES = [(3, 5), (0, 4), (), (7,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def payload(index: int) -> list[torch.Tensor]:
    """Two tensors of odd sizes and different dtypes, other values for every message."""
    generator = torch.Generator().manual_seed(index)
    first, second = SHAPES[index % 4], SHAPES[(index + 1) % 4]
    return [
        torch.randn(first, generator=generator, dtype=torch.float64).to(DTYPES[index % 3]),
        torch.randn(second, generator=generator, dtype=torch.float64).to(DTYPES[(index + 1) % 3]),
    ]


def parts_of(tensors: list[torch.Tensor]) -> list[Part]:
    return [Part(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def open_pair(limit: int = 8) -> Channel:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Channel(dist.new_group([0, 1]), source=1, target=0, device=torch.device("cpu"), limit=limit)


def _exchange(order: list[int], count: int) -> dict[int, list[torch.Tensor]]:
    """Send ``count`` messages before the first is read; read them in ``order``; then a second step over again."""
    channel, got = open_pair(), {}
    for step in range(2):
        if dist.get_rank() == 1:
            for index in range(count):
                tensors = payload(100 * step + index)
                channel.send(index, tensors)
                for tensor in tensors:
                    tensor.zero_()  # the message is a copy: the last stage goes on working in its own memory
        else:
            for index in range(count):
                channel.expect(index, parts_of(payload(100 * step + index)))
            for index in order:
                got[100 * step + index] = [tensor.clone() for tensor in channel.receive(index)]
                assert all(a is b for a, b in zip(channel.receive(index), channel.receive(index), strict=True)), (
                    "several students read one message"
                )
                channel.forget(index)
        channel.finish()
    got_bytes = channel.traffic.teacher_bytes
    dist.destroy_process_group()
    return {**got, -1: [torch.tensor(got_bytes)]}


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 0, 5, 1, 4, 2]], ids=["fifo", "shuffled"])
def test_messages_in_flight_arrive_whole_in_whatever_order_they_are_read(order):
    student, teacher = run_ranks(2, _exchange, order, len(order), timeout_s=60.0)
    assert sorted(teacher) == [-1]
    for step in range(2):
        for index in order:
            for tensor, expected in zip(student[100 * step + index], payload(100 * step + index), strict=True):
                assert tensor.dtype == expected.dtype
                assert torch.equal(tensor, expected)
    sizes = [sum(part.num_bytes for part in parts_of(payload(100 * step + i))) for step in range(2) for i in order]
    header = (int(teacher[-1][0]) - sum(sizes)) / len(sizes)
    assert 0 < header <= 64, "counted bytes are those of the payload and a small header"
    assert student[-1][0] == 0


def test_sizes_are_rounded_up_so_that_every_part_is_aligned():
    assert Part((3,), torch.bfloat16).num_bytes == 8
    assert Part((0, 7), torch.float32).num_bytes == 0
    assert Part((), torch.float64).num_bytes == 8
    assert Part((5, 1), torch.float32).num_bytes == 24


def _disagree(sent: tuple[int, list[torch.Tensor]], expected: tuple[int, list[Part]]) -> str:
    channel = open_pair()
    if dist.get_rank() == 1:
        channel.send(*sent)
        message = "sent"
    else:
        channel.expect(*expected)
        with pytest.raises(RuntimeError) as caught:
            channel.receive(expected[0])
        message = str(caught.value)
    dist.barrier()
    dist.destroy_process_group()
    return message


@pytest.mark.parametrize(
    ("sent", "expected", "numbers"),
    [
        ((1, [torch.ones(4)]), (2, [Part((4,), torch.float32)]), "microbatch 2"),
        ((0, [torch.ones(4)]), (0, [Part((8,), torch.float32)]), "microbatch 0"),
        ((0, [torch.ones(0)]), (0, [Part((1,), torch.float32)]), "microbatch 0"),
        ((0, [torch.ones(4)]), (0, [Part((2,), torch.float32), Part((2,), torch.float32)]), "microbatch 0"),
        ((3, [torch.ones(2), torch.ones(6)]), (3, [Part((6,), torch.float32), Part((2,), torch.float32)]), "batch 3"),
        pytest.param(
            (0, [torch.ones(4, dtype=torch.bfloat16)]),
            (0, [Part((4,), torch.float32)]),
            "microbatch 0",
        ),
        pytest.param(
            (0, [torch.ones(8)]),
            (0, [Part((4,), torch.float32)]),
            "microbatch 0",
        ),
    ],
    ids=["index", "fewer", "none", "parts", "swapped", "dtype", "more"],
)
def test_a_message_that_is_not_the_one_expected_is_named(sent, expected, numbers):
    student, _ = run_ranks(2, _disagree, sent, expected, timeout_s=30.0)
    assert numbers in student
    assert "header" in student
    assert "loss_mask and advantages must be the same on every pipeline stage" in student


def _finish() -> tuple[int, ...]:
    channel = open_pair()
    if dist.get_rank() == 1:
        channel.send(0, [torch.ones(2)])
        channel.send(1, [torch.ones(2)])
    else:
        for index in range(2):
            channel.expect(index, [Part((2,), torch.float32)])
            channel.receive(index)
    held = (len(channel._sent), len(channel._expected), len(channel._received))
    channel.finish()
    left = (len(channel._sent), len(channel._expected), len(channel._received))
    dist.barrier()
    dist.destroy_process_group()
    return (*held, *left)


def test_finish_lets_go_of_every_buffer():
    student, teacher = run_ranks(2, _finish, timeout_s=30.0)
    assert student == (0, 0, 2, 0, 0, 0)
    assert teacher[0] >= 2
    assert teacher[1:] == (0, 0, 0, 0, 0)


def _reuse(limit: int, count: int) -> tuple[int, int]:
    """More messages than ``limit``, sizes going up and down; the student is one behind, as in a pipeline."""
    channel = open_pair(limit)
    sizes = [(7 * index) % 5 + 1 for index in range(count)]
    for index in range(count):
        if dist.get_rank() == 1:
            channel.send(index, [torch.full((sizes[index],), float(index))])
            assert len(channel._sent) <= limit
        else:
            channel.expect(index, [Part((sizes[index],), torch.float32)])
            done = index - (limit - 1)
            if done >= 0:
                assert channel.receive(done)[0].tolist() == [float(done)] * sizes[done]
                channel.forget(done)
    buffers = len(channel._buffers._free) + len(channel._sent)
    if dist.get_rank() == 0:
        for index in range(count - limit + 1, count):
            channel.receive(index)
            channel.forget(index)
    channel.finish()
    most = channel.traffic.read().most_buffers
    dist.barrier()
    dist.destroy_process_group()
    return buffers, most


@pytest.mark.parametrize("limit", [1, 3])
def test_buffers_are_bounded_by_the_messages_in_flight_and_reused(limit):
    student, teacher = run_ranks(2, _reuse, limit, 12, timeout_s=30.0)
    assert teacher == (limit, limit)
    assert student[0] <= 1, "one message is worked on at a time"


def _too_many() -> str:
    channel = open_pair(limit=2)
    message = ""
    if dist.get_rank() == 0:
        for index in range(2):
            channel.expect(index, [Part((1,), torch.float32)])
        with pytest.raises(OISDError) as caught:
            channel.expect(2, [Part((1,), torch.float32)])
        message = str(caught.value)
    dist.barrier()
    dist.destroy_process_group()
    return message


def test_a_schedule_with_more_in_flight_is_refused_before_both_sides_wait():
    message, _ = run_ranks(2, _too_many, timeout_s=30.0)
    assert (
        "3 microbatches are between forward and backward on this stage, where Megatron's schedules leave 2" in message
    )
    assert "microbatches_in_flight=N" in message


def _one_f_one_b(stages: int, stage: int, count: int) -> list[str]:
    warmup = min(stages - stage - 1, count)
    order = ["F"] * warmup
    for _ in range(count - warmup):
        order += ["F", "B"]
    return order + ["B"] * warmup


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_the_bound_is_that_of_1f1b(stages):
    for stage in range(stages):
        in_flight_now = most = 0
        for what in _one_f_one_b(stages, stage, 16):
            in_flight_now += 1 if what == "F" else -1
            most = max(most, in_flight_now)
        assert in_flight(stages, stage, 1, None, None) == most == stages - stage
    assert in_flight(4, 0, 1, None, 2) == 2, "never more than there are"


@pytest.mark.parametrize(("stages", "chunks", "group"), [(2, 2, 2), (4, 2, 4), (4, 3, 4), (4, 2, 8), (8, 4, 8)])
def test_the_bound_holds_under_megatrons_interleaved_schedule(stages, chunks, group):
    """Megatron's own tables say which chunk every forward and backward is of."""
    from megatron.core.pipeline_parallel import schedules

    if not hasattr(schedules, "get_schedule_table"):
        pytest.skip("Megatron-Core has this since 0.12")
    count = 4 * group
    table = schedules.get_schedule_table(count, chunks, group)
    for stage in range(stages):
        warmup = min(2 * (stages - stage - 1) + (chunks - 1) * group, count * chunks)
        forwards = [chunk for _, chunk in table]
        backwards = [chunks - 1 - chunk for _, chunk in table]
        bound = in_flight(stages, stage, chunks, group, None)
        held = dict.fromkeys(range(chunks), 0)
        for number, chunk in enumerate(forwards):
            held[chunk] += 1
            assert max(held.values()) <= bound
            if number >= warmup:
                held[backwards[number - warmup]] -= 1


def _open(stages: list[int]) -> dict[int, tuple[int, int]]:
    dist.init_process_group("gloo")
    pipelines = [dist.new_group([0, 2]), dist.new_group([1, 3])]  # two pipelines, as with TP 2 or DP 2
    channels = open_channels(
        pipelines[dist.get_rank() % 2], lanes=[(1, stage) for stage in stages], limits=dict.fromkeys(stages, 2),
        device=torch.device("cpu"), traffic=Traffic(),
    )  # fmt: skip
    result = {stage: (channel.source, channel.target) for (_, stage), channel in channels.items()}
    dist.destroy_process_group()
    return result


def test_each_pipeline_has_a_lane_of_its_own_from_its_last_stage():
    assert run_ranks(4, _open, [0, 1], timeout_s=60.0) == [{0: (2, 0)}, {0: (3, 1)}, {0: (2, 0)}, {0: (3, 1)}]
