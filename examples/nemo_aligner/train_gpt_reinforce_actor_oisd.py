"""NeMo-Aligner's REINFORCE training with OISD: its own script and options, and model.oisd.*.

    python examples/nemo_aligner/train_gpt_reinforce_actor_oisd.py model.oisd.layers=[6] \
        pretrained_checkpoint.restore_from_path=ACTOR.nemo

NeMo-Aligner is looked for in ``NEMO_ALIGNER_PATH``, else in /opt/NeMo-Aligner. Guide: docs/nemo_aligner.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_oisd.errors import command_line
from megatron_oisd.integrations.nemo_aligner import run_recipe


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    if argv is not None:
        sys.argv[1:] = argv
    run_recipe("reinforce", Path(__file__).resolve().parent / "conf")


if __name__ == "__main__":
    sys.exit(main(None))
