"""Train with GRPO + OISD on Megatron-Core: torchrun --nproc-per-node N tools/train_rl.py --load ... --data ..."""

from __future__ import annotations

import signal
import sys

from megatron_oisd.errors import command_line


@command_line
def main(argv: list[str] | None = None) -> int:
    """Parse, build, train."""
    from megatron_oisd.rl.arguments import parse_arguments

    config, oisd_config = parse_arguments(argv)  # before the heavy imports: a wrong flag is reported at once

    from megatron_oisd.rl.preemption import REQUEUE_EXIT_CODE
    from megatron_oisd.rl.trainer import Trainer
    from megatron_oisd.runtime import distributed

    trainer = Trainer(config, oisd_config)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # outside the run: launchers ask more than once, also while it leaves
    finished = trainer.run()
    if not finished:
        distributed.barrier()  # a launcher stops the others when the first one leaves with a code that is not 0
    distributed.shutdown()
    if not finished:
        print(f"asked to stop after step {trainer.step}: go on with --resume", file=sys.stderr)
    return 0 if finished else REQUEUE_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
