"""Looks into a training run: operations of a step, and gradients of GRPO and of each OISD loss, layer by layer.

    python examples/study/diagnose.py --out parts.jsonl --every 10 -- TRAINING_FLAGS    # those of tools/train_rl.py
    python examples/study/diagnose.py --out cost.jsonl --count -- TRAINING_FLAGS

The run is the one that ``tools/train_rl.py`` makes with the same flags, on one rank. At every tenth step its first
update is computed once for each loss alone, from the same rollouts; the step itself is then taken as always. With
``--count`` one step is taken and its operations are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_oisd.analysis.gradients import compare_gradients, draw_gradients
from megatron_oisd.analysis.operations import OperationCounter
from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.rl.arguments import parse_arguments
from megatron_oisd.rl.batch import RolloutBatch
from megatron_oisd.rl.trainer import Trainer
from megatron_oisd.runtime import distributed

Gradients = dict[str, Tensor]


class Diagnosed(Trainer):
    """A trainer that looks at its gradients on the way and changes nothing."""

    every = 0
    """Steps between two looks; 0: none."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rows: list[dict[str, Any]] = []
        self._looked = -1

    def _update(self, batch: RolloutBatch, number: int) -> dict[str, float]:
        if self.every and self.step % self.every == 0 and self._looked != self.step:
            self._looked = self.step
            self.rows += [{"step": self.step, **row} for row in self._parts(batch, number)]
        return super()._update(batch, number)

    def _parts(self, batch: RolloutBatch, number: int) -> list[dict[str, Any]]:
        """Rows, one for each group of parameters: norms, and cosines between the losses."""
        config = self.oisd.config
        self.oisd.detach()
        parts = {
            "grpo": self._gradients(batch, number, None),
            "think": self._gradients(batch, number, dataclasses.replace(config, lambda_attn=0.0)),
            "attn": self._gradients(batch, number, dataclasses.replace(config, lambda_think=0.0)),
        }
        for name in ("think", "attn"):  # each run has GRPO's in it
            parts[name] = {key: value - parts["grpo"][key] for key, value in parts[name].items()}
        parts["oisd"] = {key: value + parts["attn"][key] for key, value in parts["think"].items()}
        self.oisd = self.policy.oisd = self._attach(config)
        return compare_gradients(parts)

    def _gradients(self, batch: RolloutBatch, number: int, config: OISDConfig | None) -> Gradients:
        oisd = self.policy.oisd = None if config is None else self._attach(config)
        self._accumulate(batch, number)
        if oisd is not None:
            oisd.detach()
        return {
            name: parameter.main_grad.double().clone()  # type: ignore[union-attr]
            for chunk in self.training.chunks
            for name, parameter in chunk.named_parameters()
        }


def count_operations(trainer: Diagnosed) -> dict[str, int]:
    """Floating-point operations of the matrix products of one step, by phase, as torch counts them."""
    counted: dict[str, int] = defaultdict(int)

    def counting(name: str, function: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            with OperationCounter() as counter:
                result = function(*arguments)
            counted[name] += counter.total
            return result

        return wrapped

    for phase, method in (("gen", "_collect"), ("old_log_prob", "_log_probs"), ("update_actor", "_update")):
        setattr(trainer, method, counting(phase, getattr(trainer, method)))
    trainer._refresh_engine()
    trainer.train_step()
    return {**counted, "step": sum(counted.values())}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Train, looking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of the rows; the figure goes beside it")
    parser.add_argument("--every", type=int, default=10, help="steps between two looks at the gradients")
    parser.add_argument("--count", action="store_true", help="one step, its operations alone")
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    own = parser.parse_args(given[:end])
    if end == len(given):
        raise OISDError("the training's flags are missing: put them behind --")
    config, oisd_config = parse_arguments(given[end + 1 :])
    trainer = Diagnosed(config, oisd_config)
    if trainer.world_size > 1:
        raise OISDError(f"{trainer.world_size} ranks: gradients are looked at on one rank, start it without torchrun")
    if own.count:
        trainer.rows = [count_operations(trainer)]
    else:
        trainer.every = own.every
        trainer.run()
    own.out.parent.mkdir(parents=True, exist_ok=True)
    own.out.write_text("".join(json.dumps(row) + "\n" for row in trainer.rows), encoding="utf-8")
    if not own.count:
        draw_gradients(trainer.rows, own.out.with_suffix(".png"))
    distributed.shutdown()


if __name__ == "__main__":
    sys.exit(main())
