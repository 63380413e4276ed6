"""The teacher's lane between two stages: order, sizes, dtypes, and the message for stages that disagree.

Every scenario runs on one pair of gloo ranks; rank 1 is the last stage and sends, rank 0 owns the student.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_oisd.pipeline.channel import Channel, Part, open_channels
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


def open_pair() -> Channel:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Channel(dist.new_group([0, 1]), source=1, target=0, device=torch.device("cpu"))


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
    got_bytes = channel.bytes_sent
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


def _open(stages: list[int]) -> dict[int, tuple[int, int]]:
    dist.init_process_group("gloo")
    pipelines = [dist.new_group([0, 2]), dist.new_group([1, 3])]  # two pipelines, as with TP 2 or DP 2
    channels = open_channels(
        pipelines[dist.get_rank() % 2], last_stage=1, student_stages=stages, device=torch.device("cpu")
    )
    result = {stage: (channel.source, channel.target) for stage, channel in channels.items()}
    dist.destroy_process_group()
    return result


def test_each_pipeline_has_a_lane_of_its_own_from_its_last_stage():
    assert run_ranks(4, _open, [0, 1], timeout_s=60.0) == [{0: (2, 0)}, {0: (3, 1)}, {0: (2, 0)}, {0: (3, 1)}]
