"""From an HF checkpoint to a Megatron checkpoint, in one process, verified before it appears."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from megatron_oisd.convert.checkpoint import save_model
from megatron_oisd.convert.families import arguments_from_hf_config
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config, tokenizer_size
from megatron_oisd.convert.output import new_directory
from megatron_oisd.convert.verify import LogitComparison, compare_logits, sample_token_ids, single_process
from megatron_oisd.convert.weights import check_tensor_names, load_hf_weights
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import build_model, transformer_config


def convert_hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: bool = True,
    force: bool = False,
) -> LogitComparison | None:
    """Convert an HF checkpoint into a Megatron checkpoint of iteration 0, loadable at any TP/PP layout.

    Args:
        source: directory with ``config.json`` and safetensors.
        target: directory to make; it appears only when it is whole and verified.
        dtype: dtype of the stored weights; None for the source's.
        verify: compare the logits of both directories, see :mod:`megatron_oisd.convert.verify`; where ``dtype`` narrows
            the weights, both sides' are rounded first.
        progress: show progress bars.
        force: replace ``target`` where it is a checkpoint.

    Returns:
        The comparison, or None with ``verify=False``.

    Raises:
        OISDError: the source is unsupported, incomplete or damaged, the target cannot be written, or the logits differ.
    """
    arguments = arguments_from_hf_config(read_hf_config(source))
    tensors = SafetensorsDirectory(source)
    check_tensor_names(arguments, tensors, str(source))
    tokens = tokenizer_size(source)
    if tokens is None:
        warnings.warn(f"{source} has no tokenizer files, so the Megatron checkpoint has none either", stacklevel=2)
    elif tokens > arguments.vocab_size:
        raise OISDError(
            f"the tokenizer in {source} has {tokens} tokens and the model {arguments.vocab_size} rows: "
            f"resize the model's embeddings (model.resize_token_embeddings) or use the tokenizer it was trained with"
        )
    dtype = dtype or tensors.dtype()
    with new_directory(target, inputs=[source], force=force) as work, single_process():
        config = transformer_config(arguments, dtype=dtype, perform_initialization=False)
        chunks = build_model(arguments, config)
        load_hf_weights(chunks, arguments, tensors, progress=progress)
        save_model(chunks, work, 0, arguments, hf_source=source)
        del chunks
        if not verify:
            return None
        comparison = compare_logits(source, work, sample_token_ids(arguments), round_to=dtype)
        if not comparison.agree:
            raise OISDError(f"the conversion of {source} is wrong and was discarded: {comparison}; please report it")
        return comparison
