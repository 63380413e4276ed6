"""Checkpoints for the analysis: HF directories and Megatron checkpoints, both read as HF tensors, one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_oisd.convert.checkpoint import (
    HF_DIRECTORY,
    iteration_name,
    latest_iteration,
    read_arguments,
    stored_dtype,
    whole_iteration,
)
from megatron_oisd.convert.families import arguments_from_hf_config
from megatron_oisd.convert.fused import unfused
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config
from megatron_oisd.convert.output import LATEST
from megatron_oisd.convert.plan import Plan, PlannedParameter
from megatron_oisd.convert.torch_dist import ParameterReader
from megatron_oisd.convert.verify import single_process
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

RUN_CHECKPOINTS = "checkpoints"
"""Where a training run keeps its Megatron checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose tensors are read when asked for."""

    label: str
    """What to call it in figures."""
    step: int | None
    """Iteration of a Megatron checkpoint; None for an HF directory."""
    hf_directory: Path
    """Holds ``config.json`` and, mostly, the tokenizer."""
    arguments: ModelArguments
    tensors: Mapping[str, Tensor]
    """By HF name, experts one by one."""


def open_checkpoint(path: str | Path, iteration: int | None = None) -> Checkpoint:
    """Open an HF directory, a Megatron checkpoint (or one ``iter_`` directory of it) or a training run's directory.

    Args:
        path: the directory.
        iteration: of a Megatron checkpoint; None for the latest.

    Raises:
        OISDError: it is none of them, incomplete, damaged, or of an unsupported architecture.
    """
    path = Path(path)
    if match := re.fullmatch(r"iter_(\d+)", path.name):
        path, iteration = path.parent, int(match[1])
    directory = megatron_directory(path)
    if directory is not None:
        number = latest_iteration(directory) if iteration is None else iteration
        arguments = read_arguments(directory)
        return Checkpoint(
            label=f"step {number}", step=number, hf_directory=directory / HF_DIRECTORY, arguments=arguments,
            tensors=MegatronTensors(directory, number, arguments),
        )  # fmt: skip
    if not (path / "config.json").is_file():
        raise OISDError(
            f"{path} is no checkpoint: expected an HF directory (config.json), a Megatron checkpoint ({LATEST}) or a "
            f"run's directory with {RUN_CHECKPOINTS}/ in it"
        )
    if iteration is not None:
        raise OISDError(f"--iteration {iteration}: {path} is an HF directory and has no iterations; leave it out")
    arguments = arguments_from_hf_config(read_hf_config(path))
    stored = SafetensorsDirectory(path)
    stored.check(arguments)
    return Checkpoint(
        label=path.resolve().name, step=None, hf_directory=path, arguments=arguments,
        tensors=unfused(stored, arguments),
    )  # fmt: skip


def megatron_directory(path: str | Path) -> Path | None:
    """Return the Megatron checkpoint directory that ``path`` is or, as a run's directory, holds; else None."""
    for directory in (Path(path), Path(path) / RUN_CHECKPOINTS):
        if (directory / LATEST).is_file():
            return directory
    return None


def iterations(path: str | Path) -> list[int]:
    """Return the whole iterations of a Megatron checkpoint or a run, ascending.

    Raises:
        OISDError: there is no Megatron checkpoint.
    """
    directory = megatron_directory(path)
    if directory is None:
        raise OISDError(f"{path} holds no Megatron checkpoint: expected {LATEST} there or in its {RUN_CHECKPOINTS}/")
    names = sorted(int(p.name.removeprefix("iter_")) for p in directory.glob("iter_*") if p.name[5:].isdecimal())
    return [number for number in names if (directory / iteration_name(number)).is_dir()]


class MegatronTensors(Mapping[str, Tensor]):
    """The HF tensors that a Megatron checkpoint holds, by HF name; one parameter is read and taken apart at a time.

    Args:
        directory: Megatron checkpoint directory.
        iteration: which one.
        arguments: the model's shape.
    """

    def __init__(self, directory: Path, iteration: int, arguments: ModelArguments) -> None:
        path = whole_iteration(directory, iteration)
        with single_process():
            plan = Plan(arguments, stored_dtype(directory, iteration))
            self._reader = ParameterReader(path, plan.model)
        self._arguments = arguments
        self._model = plan.model  # its parameters' identities are what the reader goes by
        self._entries: dict[str, PlannedParameter] = {name: entry for entry in plan.parameters for name in entry.hf}
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            entry = self._entries[name]
            # Query, key and value are one parameter and are asked for one after the other.
            self._held = dict(entry.to_hf(self._reader.read(entry.parameter), self._arguments))
        return self._held.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
