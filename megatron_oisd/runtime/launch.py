"""torchrun for a scheduler: the same flags, but it passes signals on and ends with its ranks' exit code.

::

    python -m megatron_oisd.runtime.launch --nnodes 2 --node-rank 0 --master-addr HOST --master-port PORT \\
        --nproc-per-node 8 tools/train_rl.py ...

torchrun itself dies of SIGUSR1 and leaves the ranks behind, gives them 30 s after SIGTERM whatever they still have to
write, and ends with 1 whatever they ended with. Schedulers warn with those signals, and what a job does next depends
on the exit code. Here SIGUSR1 and SIGTERM ask the ranks to leave (they get SIGUSR1, again every few seconds, since a
rank may not listen yet), and the exit code is

- that of the rank that failed first (128 + n where signal n killed it);
- 75 (EX_TEMPFAIL, "start it again") where they had been asked to leave and did not end with 0. Nothing more is needed
  of them: what is on disk is whole at any moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from types import FrameType

import psutil  # type: ignore[import-untyped]

ASKING = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_S = 2.0


class Forwarder:
    """Passes a request to leave on to the ranks, which are this process's children."""

    def __init__(self) -> None:
        self.asked = False
        """Whether this process got one of :data:`ASKING`."""

    def install(self) -> None:
        """Take the signals over; in the main thread."""
        for number in ASKING:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
            threading.Thread(target=self._repeat, daemon=True).start()

    def _repeat(self) -> None:
        while True:
            for child in psutil.Process().children():
                try:
                    child.send_signal(signal.SIGUSR1)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(REPEAT_S)


def main(argv: list[str] | None = None) -> int:
    """Run this node's ranks; returns the exit code."""
    forwarder = Forwarder()
    forwarder.install()  # before torch is imported, which takes seconds
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
    except Exception:
        if not forwarder.asked:
            raise
        traceback.print_exc()
        code = 1
    return os.EX_TEMPFAIL if forwarder.asked and code else code


def _run(argv: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = run.parse_args(argv)
    if hasattr(arguments, "signals_to_handle"):  # without it torch ends the ranks 30 s after SIGTERM
        arguments.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    try:
        run.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"rank {rank} (pid {failure.pid}) ended first, with exit code {code}", file=sys.stderr, flush=True)
        return code
    except SignalException as error:
        return os.EX_TEMPFAIL if error.sigval in ASKING else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
