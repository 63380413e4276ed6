"""From an HF checkpoint to a Megatron checkpoint, in one process, tensor by tensor, verified before it appears."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_oisd.convert.checkpoint import save_model
from megatron_oisd.convert.families import arguments_from_hf_config
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config, tokenizer_size
from megatron_oisd.convert.output import check_target, new_directory
from megatron_oisd.convert.plan import Plan
from megatron_oisd.convert.report import Prompts, Report, Verify, verify_pair
from megatron_oisd.convert.torch_dist import KeyStyle, materialiser
from megatron_oisd.convert.verify import single_process
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments


def convert_hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    verify: Verify | bool = "logits",
    prompts: Prompts | None = None,
    progress: bool = True,
    force: bool = False,
    local_experts: bool = False,
) -> Report:
    """Convert an HF checkpoint into a Megatron checkpoint of iteration 0, loadable at any TP/PP layout.

    The model is never built with weights: memory holds the largest tensor about three times, whatever the model.

    Args:
        source: directory with ``config.json`` and safetensors.
        target: directory to make; it appears only when it is whole and verified.
        dtype: dtype of the stored weights; None for the source's.
        verify: ``tensors``: read the result back and compare every tensor bit by bit; ``logits``: that, and both
            models' logits, for which each model is built in float32 (where memory lacks, the report says so);
            ``none``. True and False mean ``logits`` and ``none``.
        prompts: what to compare the logits on.
        progress: show progress bars.
        force: replace ``target`` where it is a checkpoint.
        local_experts: name the norms before experts as Megatron's local spec does, see
            :class:`~megatron_oisd.convert.torch_dist.KeyStyle`; this package reads both.

    Raises:
        OISDError: the source is unsupported, incomplete or damaged, the target cannot be written, or the result
            differs; then there is no target.
    """
    arguments, tensors, dtype = _checked_source(source, dtype)
    with new_directory(target, inputs=[source], force=force) as work, single_process():
        plan = Plan(arguments, dtype, style=KeyStyle(local_experts=local_experts))
        make = materialiser(plan.from_hf(tensors))
        with tqdm(total=plan.nbytes, desc="writing", unit="B", unit_scale=True, disable=not progress) as bar:

            def materialise(view: Tensor) -> Tensor:
                bar.update(view.numel() * view.dtype.itemsize)
                return make(view)

            save_model(
                [plan.model], work, 0, arguments, hf_source=source, materialise=materialise, manifest=True,
                style=plan.style,
            )  # fmt: skip
        report = verify_pair(
            source, work, verify=verify, prompts=prompts, round_to=dtype, progress=progress, names=(source, target)
        )
        if not report.agree:
            raise OISDError(
                f"the conversion of {source} is wrong and was discarded: {report.verdict}; please report it"
            )
        return report


def plan_hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    local_experts: bool = False,
) -> Plan:
    """Check all that :func:`convert_hf_to_mcore` checks beforehand and return its plan; writes nothing."""
    arguments, _, dtype = _checked_source(source, dtype)
    check_target(target, inputs=[source], force=force)
    with single_process():
        return Plan(arguments, dtype, style=KeyStyle(local_experts=local_experts))


def _checked_source(
    source: str | Path, dtype: torch.dtype | None
) -> tuple[ModelArguments, SafetensorsDirectory, torch.dtype]:
    arguments = arguments_from_hf_config(read_hf_config(source))
    tensors = SafetensorsDirectory(source)
    tensors.check(arguments)
    tokens = tokenizer_size(source)
    if tokens is None:
        warnings.warn(f"{source} has no tokenizer files, so the Megatron checkpoint has none either", stacklevel=3)
    elif tokens > arguments.vocab_size:
        raise OISDError(
            f"the tokenizer in {source} has {tokens} tokens and the model {arguments.vocab_size} rows: "
            f"resize the model's embeddings (model.resize_token_embeddings) or use the tokenizer it was trained with"
        )
    return arguments, tensors, dtype or tensors.dtype()
