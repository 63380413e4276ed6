"""Megatron-LM's ``train_rl.py`` with OISD: torchrun --nproc-per-node N train_rl_oisd.py --oisd-layers 6 ...

The checkout is the one that MEGATRON_LM_PATH names, unchanged; every argument of its ``train_rl.py`` goes through. See
``docs/megatron_lm.md``.
"""

from __future__ import annotations

import runpy
import sys

from megatron_oisd.errors import command_line
from megatron_oisd.integrations.megatron_lm import find_checkout, install


@command_line
def main(argv: list[str] | None = None) -> None:
    """Wrap what ``train_rl.py`` calls, then run it."""
    script = str(find_checkout() / "train_rl.py")
    install()
    sys.argv = [script, *(sys.argv[1:] if argv is None else argv)]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.exit(main(None))
