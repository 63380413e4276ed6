"""Runs a function on several gloo ranks, each a process with one thread, and brings back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

MAX_RANKS = 4  # two cores: more would only wait for each other

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.preload"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks; return their results by rank.

    The function and its arguments must be picklable (module level). A rank that raises fails the test with its
    traceback, a rank that hangs with the names of those missing; the others are killed in either case.
    """
    assert 1 <= world_size <= MAX_RANKS
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = _context.Queue()
    processes = [
        _context.Process(target=_entry, args=(rank, world_size, port, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcome: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(outcome) < world_size:
            try:
                rank, ok, payload = results.get(timeout=0.5)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in outcome]
                if dead:
                    raise AssertionError(f"ranks {dead} died without a word") from None
                if time.monotonic() > deadline:
                    missing = sorted(set(range(world_size)) - set(outcome))
                    raise AssertionError(f"ranks {missing} did not finish within {timeout_s} s") from None
                continue
            if not ok:
                raise AssertionError(f"rank {rank} raised:\n{payload}")
            outcome[rank] = pickle.loads(payload)
    finally:
        for process in processes:
            if len(outcome) < world_size:
                process.kill()
            process.join()
    return [outcome[rank] for rank in range(world_size)]


def _entry(
    rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        result = pickle.dumps(function(*args))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        return
    results.put((rank, True, result))
