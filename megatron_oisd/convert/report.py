"""One report about a pair of checkpoints, HF and Megatron: are they the same model?

Tensors are compared bit by bit, read one at a time. Logits need both models in memory, one after the other in float32;
where they do not fit, the report says so and rests on the tensors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_oisd.convert.checkpoint import read_arguments, stored_dtype, whole_iteration
from megatron_oisd.convert.fused import unfused
from megatron_oisd.convert.hf_files import SafetensorsDirectory
from megatron_oisd.convert.output import write_text
from megatron_oisd.convert.plan import Plan
from megatron_oisd.convert.torch_dist import ParameterReader
from megatron_oisd.convert.verify import (
    TOLERANCE,
    LogitComparison,
    compare_logits,
    prompt_token_ids,
    sample_token_ids,
    single_process,
)
from megatron_oisd.errors import OISDError

Verify = Literal["logits", "tensors", "none"]
"""How far to check: both, tensors only, nothing."""
Prompts = Sequence[str | Sequence[int]]
"""Texts or token ids on which logits are compared."""

MEMORY_FACTOR = 2.0
"""Memory that comparing logits takes, in float32 sizes of the model: loading holds parts of it twice."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known about a pair of checkpoints."""

    hf: str
    mcore: str
    iteration: str
    """Directory name of the iteration."""
    architecture: str
    weights: int
    """Number of weights, vocabulary padding included."""
    hf_tensors: int
    """Tensors of the HF checkpoint; every one is a part of a Megatron parameter."""
    megatron_parameters: int
    """Parameters of the whole model; every one is made of HF tensors."""
    hf_dtype: str
    mcore_dtype: str
    identical: int | None = None
    """HF tensors that are bit by bit what the Megatron checkpoint holds; None where they were not compared."""
    rounded: int | None = None
    """Those that are so after rounding to the narrower of both dtypes."""
    different: list[str] = field(default_factory=list)
    """Names of all others."""
    logits: LogitComparison | None = None
    note: str = ""
    """Why something was not compared."""

    @property
    def agree(self) -> bool:
        """Whether nothing that was compared differs."""
        return not self.different and (self.logits is None or self.logits.agree)

    @property
    def verdict(self) -> str:
        """One line: what differs, or what agrees."""
        if self.different:
            return f"{len(self.different)} tensors differ, the first {self.different[0]}"
        if self.logits is not None:
            return str(self.logits)
        return "nothing was compared" if self.identical is None else "all tensors are identical"

    def __str__(self) -> str:
        lines = [
            f"{self.architecture}: {self.hf_tensors} HF tensors ({self.hf_dtype}) are {self.megatron_parameters} "
            f"Megatron parameters ({self.mcore_dtype}, {self.iteration}), {self.weights} weights"
        ]
        if self.identical is not None:
            rounded = f", {self.rounded} equal after rounding" if self.rounded else ""
            lines.append(f"tensors: {self.identical} identical bit for bit{rounded}, {len(self.different)} different")
        if self.logits is not None:
            lines.append(str(self.logits))
        return "\n".join([*lines, self.note] if self.note else lines)

    def write(self, path: str | Path) -> None:
        """Write the report as JSON."""
        content: dict[str, Any] = dataclasses.asdict(self) | {"agree": self.agree}
        if self.logits is not None:
            content["logits"]["tolerance"] = TOLERANCE
        try:
            write_text(Path(path), json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise OISDError(f"report {path} cannot be written ({error.strerror}): choose another file") from error


def verify_pair(
    hf_dir: str | Path,
    mcore_dir: str | Path,
    iteration: int | None = None,
    *,
    verify: Verify | bool = "logits",
    prompts: Prompts | None = None,
    token_ids: Tensor | None = None,
    round_to: torch.dtype | None = None,
    progress: bool = True,
    names: tuple[str | Path, str | Path] | None = None,
) -> Report:
    """Compare an HF checkpoint with a Megatron checkpoint.

    Args:
        hf_dir: directory in HF format.
        mcore_dir: Megatron checkpoint directory.
        iteration: of the Megatron checkpoint; None for the latest.
        verify: what to compare; True and False mean ``logits`` and ``none``.
        prompts: texts or token ids for the logits.
        token_ids: ``[b, s]`` for the logits in the place of prompts; without either a fixed random sample.
        round_to: round both models' weights to this dtype before logits are computed.
        progress: show a progress bar.
        names: what to call the two directories in the report; hf first, in the order of the arguments for a converter.

    Raises:
        OISDError: a checkpoint cannot be read, or holds another set of tensors than its config says.
    """
    level = {True: "logits", False: "none"}.get(verify, verify) if isinstance(verify, bool) else verify
    arguments = read_arguments(mcore_dir)
    tensors = SafetensorsDirectory(hf_dir)
    tensors.check(arguments)
    stored, directory = stored_dtype(mcore_dir, iteration), whole_iteration(mcore_dir, iteration)
    found: dict[str, Any] = {}
    with single_process():
        plan = Plan(arguments, stored)
        if level != "none":
            found = _compare_tensors(plan, tensors, ParameterReader(directory, plan.model), progress)
    note = "" if level != "none" else "nothing was compared (--no-verify)"
    if level == "logits" and not found["different"]:
        needed, available = int(MEMORY_FACTOR * 4 * plan.numel), available_memory()
        if needed > available:
            note = (
                f"logits were not compared: both models in float32 take up to {needed / 2**30:.1f} GiB, and "
                f"{available / 2**30:.1f} GiB are available"
            )
        else:
            batches = [sample_token_ids(arguments) if token_ids is None else token_ids]
            if prompts:
                batches = prompt_token_ids(prompts, hf_dir, arguments)
            found["logits"] = compare_logits(hf_dir, mcore_dir, batches, iteration, round_to=round_to)
    shown = names or (hf_dir, mcore_dir)
    return Report(
        hf=str(shown[0]),
        mcore=str(shown[1]),
        iteration=directory.name,
        architecture=arguments.architecture,
        weights=plan.numel,
        hf_tensors=len(tensors),
        megatron_parameters=len(plan.parameters),
        hf_dtype=str(tensors.dtype()).removeprefix("torch."),
        mcore_dtype=str(stored).removeprefix("torch."),
        note=note,
        **found,
    )


def available_memory() -> int:
    """Return the bytes that a process may take without swapping, as the system reports them."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def _compare_tensors(
    plan: Plan, tensors: SafetensorsDirectory, reader: ParameterReader, progress: bool
) -> dict[str, Any]:
    """Fields of the report: how each HF tensor compares with what the Megatron checkpoint holds."""
    theirs = unfused(tensors, plan.arguments)
    counts, different = {"identical": 0, "rounded": 0}, []
    with tqdm(desc="comparing", unit="tensor", total=len(plan.hf_shapes), disable=not progress) as bar:
        for name, megatron in plan.to_hf(reader):
            kind = _relation(theirs[name], megatron)
            del megatron  # not while the next one is read
            if kind == "different":
                different.append(name)
            else:
                counts[kind] += 1
            bar.update()
    return {**counts, "different": different}


def _relation(one: Tensor, other: Tensor) -> str:
    if one.dtype == other.dtype:
        return "identical" if _same_bits(one, other) else "different"
    if one.dtype.itemsize < other.dtype.itemsize:
        one, other = other, one
    if _same_bits(one, other.to(one.dtype)):
        return "identical"  # the wider one holds what the narrower one holds
    return "rounded" if _same_bits(one.to(other.dtype), other) or _same_bits(one, other.to(one.dtype)) else "different"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality in which NaN equals itself and 0 is not -0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
