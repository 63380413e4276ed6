"""SIGTERM and SIGUSR1 ask a run to write a checkpoint and leave, so that a scheduler may start it again.

A signal may reach one rank or all of them, at different moments. A rank only takes note of it; what to do is decided
together, where all ranks are at the same place (:meth:`StopRequest.agreed`). Inside :meth:`StopRequest.interruptible`
a rank does not wait for the end of what it does alone: there the signal raises :class:`Interrupted`, and the block's
owner tells the other ranks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

REQUEUE_EXIT_CODE = 75
"""The exit code of a run that was asked to leave and can go on with ``--resume``: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """A stop was asked for; raised inside :meth:`StopRequest.interruptible` and by code that saw all ranks agree."""


class StopRequest:
    """Takes note of SIGTERM and SIGUSR1 while it is entered; the earlier handlers come back when it is left.

    Signal handlers belong to a process's main thread. Entered in another thread it does nothing: such a run cannot
    be asked to stop, only killed.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether this rank got a signal."""
        self._interruptible = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank got a signal; a collective over all ranks (one number).

        Args:
            device: of the number that is reduced: the backend's.
        """
        flag = torch.tensor([int(self.requested)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block without collectives which a signal ends with :class:`Interrupted`, also one that came before."""
        self._interruptible = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False  # once: cleaning up must not be interrupted too
            raise Interrupted
