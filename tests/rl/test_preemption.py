"""A run that is asked to leave: the signal is noted, agreed on by all ranks, and interrupts only where it may."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_oisd.rl.preemption import Interrupted, StopRequest
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_earlier_handler_comes_back(number):
    seen: list[int] = []
    earlier = signal.signal(number, lambda n, frame: seen.append(n))
    try:
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            assert seen == []
        os.kill(os.getpid(), number)
        assert seen == [number]
    finally:
        signal.signal(number, earlier)


def test_an_interruptible_block_ends_at_once_others_do_not():
    with StopRequest() as stop:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        start = time.monotonic()
        with pytest.raises(Interrupted), stop.interruptible():
            time.sleep(30)
        assert time.monotonic() - start < 10
        os.kill(os.getpid(), signal.SIGTERM)  # outside: only noted
        with pytest.raises(Interrupted), stop.interruptible():
            raise AssertionError("a block after the request must not begin")


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def body() -> None:
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [before]


def _agree(asked: list[int]) -> list[bool]:
    dist.init_process_group("gloo")
    answers = []
    with StopRequest() as stop:
        answers.append(stop.agreed(torch.device("cpu")))
        if dist.get_rank() in asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        answers.append(stop.agreed(torch.device("cpu")))
    dist.destroy_process_group()
    return answers


@pytest.mark.parametrize("asked", [[], [1], [0, 1]])
def test_all_ranks_agree_when_one_is_asked(asked):
    assert run_ranks(2, _agree, asked) == [[False, bool(asked)]] * 2
