"""The error a user can act on, and how command lines report it.

``OISDError`` carries one line: the value that is wrong, what was expected, how to mend it. Command lines print that
line and leave with exit code 2; under torchrun the other ranks are then stopped by the launcher within seconds.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable

_LET_RANK_0_SPEAK_S = 3.0


class OISDError(ValueError):
    """A user's input cannot be used. The message is one line and names value, expectation and cure."""


def command_line(main: Callable[[list[str] | None], int | None]) -> Callable[[list[str] | None], int]:
    """Wrap ``main(argv)``: an :class:`OISDError` becomes one line on stderr and exit code 2 instead of a traceback."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except OISDError as error:
            if os.environ.get("RANK", "0") != "0":
                # Mostly every rank fails for the same reason. Rank 0 says it and the launcher stops the others, who
                # would only repeat it; where rank 0 is fine, this one speaks after all.
                time.sleep(_LET_RANK_0_SPEAK_S)
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2

    return wrapped
