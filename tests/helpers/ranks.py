"""Runs a function on several gloo ranks, each a process with one thread, and brings back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

MAX_RANKS = 4  # two cores: more would only wait for each other

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.helpers.preload"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks; return their results by rank.

    The function and its arguments must be picklable (module level). A rank that raises fails the test with its
    traceback, a rank that hangs with the names of those missing; the others are killed in either case.
    """
    processes, results, _store = _start(world_size, function, args)
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


@dataclass
class Ending:
    """How one rank ended: it returned ``value``, raised ``error`` (a traceback) or was killed by ``signal``."""

    value: Any = None
    error: str = ""
    signal: int = 0


def endings(
    world_size: int, function: Callable[..., Any], *args: Any, limit_s: float, stopped: Collection[int] = ()
) -> list[Ending]:
    """Like :func:`run_ranks`, for runs that are meant to go wrong: how every rank ended, by itself, within ``limit_s``.

    Only the ``stopped`` ranks are not waited for; they are killed when the others have ended.
    """
    processes, results, _store = _start(world_size, function, args)
    others = [process for rank, process in enumerate(processes) if rank not in stopped]
    found = [Ending() for _ in processes]
    deadline = time.monotonic() + limit_s
    try:
        while True:
            over = all(process.exitcode is not None for process in others)
            try:
                rank, ok, payload = results.get(timeout=0.05)
                found[rank] = Ending(value=pickle.loads(payload)) if ok else Ending(error=payload)
            except queue.Empty:
                if over:
                    break
                if time.monotonic() > deadline:
                    alive = [rank for rank, process in enumerate(processes) if process.exitcode is None]
                    said = "\n".join(ending.error for ending in found)
                    raise AssertionError(f"ranks {alive} hang, {limit_s} s after the start\n{said}") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    for ending, process in zip(found, processes, strict=True):
        ending.signal = max(0, -(process.exitcode or 0))
    return found


def _start(world_size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[list[Any], Any, Any]:
    """The processes, started, the queue of what they bring back, and the store that they meet at: keep it."""
    assert 1 <= world_size <= MAX_RANKS
    # As torchrun does: the parent holds the store, so that nobody takes a port between asking for it and using it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results: Any = _context.Queue()
    processes = [
        _context.Process(target=_entry, args=(rank, world_size, store.port, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, results, store


def _entry(
    rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        result = pickle.dumps(function(*args))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        return
    results.put((rank, True, result))


def kill_ranks(world_size: int, function: Callable[..., Any], *args: Any, after_s: float, first: int = 0) -> list[Any]:
    """Like :func:`run_ranks`, but SIGKILL rank ``first`` after ``after_s`` seconds, and then the others, as a launcher
    would.

    Returns:
        The results by rank where all had ended by themselves before that; otherwise an empty list.
    """
    processes, results, _store = _start(world_size, function, args)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline and any(process.exitcode is None for process in processes):
        time.sleep(0.005)
    for process in (processes[first], *processes):
        process.kill()
    outcome: dict[int, Any] = {}
    for process in processes:
        process.join()
    while True:
        try:
            rank, ok, payload = results.get(timeout=0.2)
        except queue.Empty:
            break
        except Exception:  # a rank killed in the middle of its message
            return []
        assert ok, payload
        outcome[rank] = pickle.loads(payload)
    return [outcome[rank] for rank in range(world_size)] if len(outcome) == world_size else []
