"""From a Megatron checkpoint to an HF checkpoint that transformers and vLLM load, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_oisd.convert.checkpoint import HF_DIRECTORY, load_model, read_arguments, stored_dtype
from megatron_oisd.convert.families import hf_shapes
from megatron_oisd.convert.hf_files import copy_hf_files, read_hf_config
from megatron_oisd.convert.output import new_directory
from megatron_oisd.convert.verify import LogitComparison, compare_logits, sample_token_ids, single_process
from megatron_oisd.convert.weights import export_hf_weights
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import build_model, transformer_config

SHARD_BYTES = 5 * 10**9
"""Largest safetensors file written; a bigger model becomes shards with an index."""


def convert_mcore_to_hf(
    source: str | Path,
    target: str | Path,
    *,
    iteration: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: bool = True,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> LogitComparison | None:
    """Convert one iteration of a Megatron checkpoint, written at any layout, into an HF directory.

    Args:
        source: Megatron checkpoint directory with its ``hf/``.
        target: directory to make; it appears only when it is whole and verified.
        iteration: which one; None for the latest.
        dtype: dtype of the written weights; None for the stored one.
        verify: compare the logits of both directories; where ``dtype`` narrows the weights, both sides' are
            rounded first.
        progress: show a progress bar.
        force: replace ``target`` where it is a checkpoint.
        shard_bytes: size above which the weights are split into several files.

    Returns:
        The comparison, or None with ``verify=False``.

    Raises:
        OISDError: the source is incomplete or damaged, the target cannot be written, or the logits differ.
    """
    from megatron.core import parallel_state

    source = Path(source)
    arguments = read_arguments(source)
    stored = stored_dtype(source, iteration)
    dtype = dtype or stored
    with new_directory(target, inputs=[source], force=force) as work, single_process():
        chunks = build_model(arguments, transformer_config(arguments, dtype=stored, perform_initialization=False))
        load_model(chunks, source, iteration)
        exported = export_hf_weights(
            chunks,
            arguments,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dtype=dtype,
        )
        total = len(hf_shapes(arguments))
        tensors = {
            name: tensor.cpu()
            for name, tensor in tqdm(exported, desc="weights", unit="tensor", total=total, disable=not progress)
        }
        del chunks
        copy_hf_files(source / HF_DIRECTORY, work)
        _write_config_dtype(work, dtype)
        write_safetensors(tensors, work, shard_bytes)
        del tensors
        if not verify:
            return None
        comparison = compare_logits(work, source, sample_token_ids(arguments), iteration, round_to=dtype)
        if not comparison.agree:
            raise OISDError(f"the conversion of {source} is wrong and was discarded: {comparison}; please report it")
        return comparison


def write_safetensors(tensors: dict[str, Tensor], directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or shards of at most ``shard_bytes`` with ``model.safetensors.index.json``."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    try:
        for file, names in split.filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    except Exception as error:
        raise OISDError(f"cannot write weights to {directory} ({error}): check the free space") from error


def _write_config_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Say in ``config.json`` what the weights are, under the key that the source used."""
    config = read_hf_config(directory)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != str(dtype).removeprefix("torch."):
        config[key] = str(dtype).removeprefix("torch.")
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
