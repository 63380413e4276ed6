"""From a Megatron checkpoint to an HF checkpoint that transformers and vLLM load, in one process, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_oisd.convert.checkpoint import HF_DIRECTORY, model_tensors, read_arguments, stored_dtype, whole_iteration
from megatron_oisd.convert.hf_files import copy_hf_files, read_hf_config
from megatron_oisd.convert.manifest import write_manifest
from megatron_oisd.convert.output import check_target, new_directory, sync_directory
from megatron_oisd.convert.plan import Plan
from megatron_oisd.convert.report import Prompts, Report, Verify, verify_pair
from megatron_oisd.convert.safetensors_io import ShardedWriter
from megatron_oisd.convert.torch_dist import KeyStyle, ParameterReader
from megatron_oisd.convert.verify import single_process
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

SHARD_BYTES = 5 * 10**9
"""Largest safetensors file written; a bigger model becomes shards with an index."""


def convert_mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: Verify | bool = "logits",
    prompts: Prompts | None = None,
    progress: bool = True,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Convert one iteration of a Megatron checkpoint, written at any layout, into an HF directory.

    The model is never built with weights: memory holds the largest tensor about three times, whatever the model.

    Args:
        source: Megatron checkpoint directory with its ``hf/``.
        target: directory to make; it appears only when it is whole and verified.
        iteration: which one; None for the latest.
        dtype: dtype of the written weights; None for the stored one.
        verify: as in :func:`megatron_oisd.convert.hf_to_mcore.convert_hf_to_mcore`.
        prompts: what to compare the logits on.
        progress: show progress bars.
        force: replace ``target`` where it is a checkpoint.
        shard_bytes: size above which the weights are split into several files.

    Raises:
        OISDError: the source is incomplete or damaged, the target cannot be written, or the result differs; then there
            is no target.
    """
    source = Path(source)
    arguments, stored, directory = _checked_source(source, iteration)
    dtype = dtype or stored
    with new_directory(target, inputs=[source], force=force) as work, single_process():
        plan = Plan(arguments, stored)
        reader = ParameterReader(directory, plan.model)
        copy_hf_files(source / HF_DIRECTORY, work)
        _write_config_dtype(work, dtype)
        shapes = plan.hf_shapes
        writer = ShardedWriter(work, shapes, dtype, shard_bytes)
        tensors = plan.to_hf(reader)
        writer.write(tqdm(tensors, desc="writing", unit="tensor", total=len(shapes), disable=not progress))
        counts = {file: len(names) for file, names in writer.files.items()}
        write_manifest(work, digests=writer.digests, tensors=counts)
        sync_directory(work)
        report = verify_pair(
            work,
            source,
            iteration,
            verify=verify,
            prompts=prompts,
            round_to=dtype,
            progress=progress,
            names=(target, source),
        )
        if not report.agree:
            raise OISDError(
                f"the conversion of {source} is wrong and was discarded: {report.verdict}; please report it"
            )
        return report


def plan_mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Plan, ShardedWriter]:
    """Check all that :func:`convert_mcore_to_hf` checks beforehand; writes nothing.

    Returns:
        Its plan, and what would write the files.
    """
    arguments, stored, directory = _checked_source(source, iteration)
    target = check_target(target, inputs=[source], force=force)
    with single_process():
        plan = Plan(arguments, stored, style=KeyStyle.of(model_tensors(directory)))
        ParameterReader(directory, plan.model)
        return plan, ShardedWriter(target, plan.hf_shapes, dtype or stored, shard_bytes)


def _checked_source(source: str | Path, iteration: int | None) -> tuple[ModelArguments, torch.dtype, Path]:
    """Shape, stored dtype and directory of an iteration."""
    arguments, directory = read_arguments(source), whole_iteration(source, iteration)
    pieces = sum(len(entry.chunks) for entry in model_tensors(directory).values())
    if arguments.num_layers > pieces:  # before a model of absurd length is built
        raise OISDError(
            f"{source}/{HF_DIRECTORY}/config.json says {arguments.num_layers} layers, and {directory} has {pieces} "
            f"pieces of tensors: it is another model's"
        )
    return arguments, stored_dtype(source, iteration), directory


def _write_config_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Say in ``config.json`` what the weights are, under the key that the source used."""
    config = read_hf_config(directory)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != str(dtype).removeprefix("torch."):
        config[key] = str(dtype).removeprefix("torch.")
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
