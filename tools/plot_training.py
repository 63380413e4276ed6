"""Draw the training curves of one or several runs into one PNG and one SVG.

    python tools/plot_training.py --run OISD=runs/oisd --run GRPO=runs/grpo \
        --evaluation runs/evaluation/table.json --output runs/curves.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_oisd.analysis.training_curves import draw
from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.metrics_log import read_metrics


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="LABEL=PATH",
        help="a run's name in the figure and its directory or metrics.jsonl; repeat to overlay runs",
    )
    parser.add_argument("--evaluation", type=Path, help="table.json of tools/evaluate.py, for the held-out panel")
    parser.add_argument(
        "--output", type=Path, default=Path("training_curves.png"), help="the PNG; an SVG goes beside it"
    )
    return parser.parse_args(argv)


def read_evaluation(path: Path) -> Any:
    """Return the JSON content of ``path``."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OISDError(f"{path}: not a readable table.json ({error}); give the one tools/evaluate.py wrote") from error


@command_line
def main(argv: list[str] | None = None) -> None:
    """Read the logs and draw."""
    arguments = parse_arguments(argv)
    runs: dict[str, list[dict[str, Any]]] = {}
    for item in arguments.run:
        label, separator, path = item.partition("=")
        if not (label and separator and path):
            raise OISDError(f"--run {item!r}: expected LABEL=PATH, for example OISD=runs/oisd")
        if label in runs:
            raise OISDError(f"--run {item!r}: the label {label!r} was given before; name each run differently")
        runs[label] = read_metrics(path)
    evaluation = read_evaluation(arguments.evaluation) if arguments.evaluation else None
    for file in draw(runs, arguments.output, evaluation):
        print(file)


if __name__ == "__main__":
    sys.exit(main(None))
