"""The trainer's log: one JSON line per step in ``metrics.jsonl``, the same numbers in TensorBoard and Weights & Biases.

The names are verl's; TensorBoard and W&B get some of them under Megatron-LM's names as well (:data:`MEGATRON_NAMES`).

Each line is ``{"step": 3, "time": 1767225600.0, "critic/rewards/mean": 0.5, ...}``, time in unix seconds. JSON has no
NaN: a value that is not finite is written as null and its key listed under ``"non_finite"``, so that it is seen, and
other programs can still read the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_oisd.errors import OISDError

FILE_NAME = "metrics.jsonl"
SAMPLES = "samples"
RESERVED = ("step", "time", "non_finite")
MEGATRON_NAMES = {"actor/lr": "learning-rate", "actor/grad_norm": "grad-norm", "timing_s/step": "iteration-time"}


@dataclass(frozen=True, kw_only=True)
class RolloutSample:
    """One rollout as a reader sees it."""

    prompt: str
    response: str
    ground_truth: str
    reward: float
    finish_reason: str


class WandbRun:
    """A run of Weights & Biases (extra ``wandb``); offline it needs no account and no network.

    Args:
        project: its project.
        name: its name.
        mode: ``"offline"`` or ``"online"``.
        config: shown beside the run.

    Raises:
        OISDError: the package is missing or the run cannot be started.
    """

    def __init__(self, project: str, *, name: str, mode: str, config: Mapping[str, Any]) -> None:
        self._arguments: dict[str, Any] = {"project": project, "name": name, "mode": mode, "config": dict(config)}
        self._run: Any = None

    def start(self, directory: Path) -> None:
        """Begin, with the files below ``directory``."""
        try:
            import wandb
        except ImportError as error:
            raise OISDError("--wandb-project needs wandb: pip install 'megatron_oisd[wandb]'") from error
        # The same run again where this one goes on with an earlier one.
        identity = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).hexdigest()
        try:
            self._run = wandb.init(dir=str(directory), id=identity, resume="allow", **self._arguments)
        except Exception as error:  # wandb raises kinds of its own
            raise OISDError(f"Weights & Biases cannot start ({error}): log in, or use --wandb-mode offline") from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class MetricsLog:
    """Appends metrics to ``<directory>/metrics.jsonl`` and, unless switched off, to TensorBoard event files there.

    A resumed run opens the same directory again: lines are appended, and TensorBoard drops its points from the first
    step written on. Use on one rank only.

    Args:
        directory: made when absent.
        tensorboard: also write TensorBoard scalars. Where the package is missing a warning says so, once.
        keep_until: the last step that a resumed run goes on from: what was logged for later ones is dropped, they come
            again. None keeps everything.
        wandb: log there too.

    Raises:
        OISDError: the directory or the file cannot be made.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        tensorboard: bool = True,
        keep_until: int | None = None,
        wandb: WandbRun | None = None,
    ) -> None:
        self.path = Path(directory) / FILE_NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_half_written_line(self.path)
            if keep_until is not None:
                _drop_later_steps(self.path, keep_until)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise OISDError(f"{self.path}: the metrics log cannot be written ({error.strerror}); change it") from error
        self._tensorboard = tensorboard and _tensorboard_available()
        self._writer: Any = None
        self._wandb = wandb
        if wandb is not None:
            wandb.start(self.path.parent)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of ``step`` and flush.

        Args:
            step: the training step.
            metrics: names to numbers; anything ``float()`` takes (Python, NumPy, one-element tensors).

        Raises:
            OISDError: a name is reserved or a value is not a number.
        """
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        finite: dict[str, float] = {}
        non_finite: list[str] = []
        for name, value in metrics.items():
            number = _number(name, value)
            if math.isfinite(number):
                record[name] = finite[name] = number
            else:
                record[name] = None
                non_finite.append(name)
        if non_finite:
            record["non_finite"] = non_finite
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        finite |= {other: finite[name] for name, other in MEGATRON_NAMES.items() if name in finite}
        if self._tensorboard:
            self._write_tensorboard(int(step), finite)
        if self._wandb is not None:
            self._wandb.write(int(step), finite)

    def write_samples(self, step: int, samples: Sequence[RolloutSample]) -> None:
        """Write rollouts as text to ``samples/step_0000010.txt``, and to TensorBoard."""
        parts = [
            f"--- {number} of {len(samples)}: reward {sample.reward:g}, ended by {sample.finish_reason}, truth "
            f"{sample.ground_truth}\n[prompt]\n{sample.prompt}\n[response]\n{sample.response}\n"
            for number, sample in enumerate(samples, start=1)
        ]
        path = self.path.parent / SAMPLES / f"step_{step:07d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(parts), encoding="utf-8")
        if self._tensorboard:
            self._open_tensorboard(step).add_text("rollouts", "".join(f"```\n{part}\n```\n" for part in parts), step)

    def close(self) -> None:
        """Close both files; closing twice is harmless."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_tensorboard(self, step: int, finite: Mapping[str, float]) -> None:
        writer = self._open_tensorboard(step)
        for name, number in finite.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    def _open_tensorboard(self, step: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path.parent), purge_step=step)
        return self._writer


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics file, or the one in a run's directory: one dict per step, steps ascending.

    A half-written last line, left by a killed run, is ignored. Where a resumed run goes back to an earlier step, what
    was written for later steps is dropped and the step's own values are replaced; several lines of one step are merged.

    Raises:
        OISDError: the file is missing, or a line other than the last is not a record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise OISDError(f"{path}: no metrics can be read ({error.strerror}); give a run's directory") from error
    records: list[dict[str, Any]] = []
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if row == len(lines):
                break
            raise OISDError(f"{path}: line {row} is not a metrics record; remove that line") from error
        while records and records[-1]["step"] > step:
            records.pop()
        if records and records[-1]["step"] == step:
            records[-1] = _merged(records[-1], record)
        else:
            records.append(record)
    return records


def _merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    non_finite = [name for name in earlier.get("non_finite", []) if name not in later]
    non_finite += later.get("non_finite", [])
    merged = {**earlier, **later}
    merged.pop("non_finite", None)
    return {**merged, "non_finite": non_finite} if non_finite else merged


def _number(name: str, value: Any) -> float:
    if name in RESERVED:
        raise OISDError(f"metric name {name!r} is reserved; choose another")
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except OverflowError:  # a whole number beyond float
        return math.inf
    except (TypeError, ValueError, RuntimeError) as error:
        raise OISDError(f"metric {name!r} is a {type(value).__name__}, expected one number") from error
    # Counts keep their form in the file: 7, not 7.0.
    return int(value) if isinstance(value, int) else number


def _drop_half_written_line(path: Path) -> None:
    """Cut what a killed run left after the last line end, so that the next record starts a line of its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        keep = content.rfind(b"\n") + 1
        if keep != len(content):
            file.seek(keep)
            file.truncate()
            os.fsync(file.fileno())


def _drop_later_steps(path: Path, last: int) -> None:
    """Remove the records after ``last`` and, of steps that were logged twice, the older ones; whole or not at all."""
    if not path.exists():
        return
    records = [record for record in read_metrics(path) if record["step"] <= last]
    work = path.with_name(f".{path.name}.incomplete")
    with work.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)


def _tensorboard_available() -> bool:
    if importlib.util.find_spec("tensorboard") is None:
        warnings.warn(
            "tensorboard is not installed, so metrics go to metrics.jsonl only; pip install 'megatron_oisd[rl]' or "
            "pass tensorboard=False",
            stacklevel=3,
        )
        return False
    return True
