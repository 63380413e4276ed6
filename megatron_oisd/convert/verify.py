"""Proves a conversion: both checkpoints are read back from disk and must give the same logits.

Weights are upcast to float32 on both sides, so that what is left is the order of summation: about 1e-6 of the largest
logit for a small model, growing with depth. A wrong layout, rotary base or missing bias is off by 1e-2 and more.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.convert.checkpoint import load_model, read_arguments
from megatron_oisd.convert.hf_files import load_tokenizer
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime import cpu
from megatron_oisd.runtime.distributed import initialize, shutdown
from megatron_oisd.runtime.model import ModelArguments, build_model, transformer_config

TOLERANCE = 1e-4
"""Largest accepted difference of logits, relative to the largest logit."""


@dataclass(frozen=True)
class LogitComparison:
    """How far two models' logits are apart, over all tokens and the true vocabulary."""

    max_abs: float
    max_rel: float
    """``max_abs`` divided by the largest absolute HF logit."""
    largest_logit: float
    tokens: int
    same_argmax: int
    """Tokens at which both models prefer the same next token."""

    @property
    def agree(self) -> bool:
        """Whether the difference is rounding; False for NaN."""
        return self.max_rel <= TOLERANCE

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens in float32: max abs difference {self.max_abs:.3e}, "
            f"relative to the largest logit {self.max_rel:.3e}, same argmax at {self.same_argmax}/{self.tokens}"
        )


def sample_token_ids(arguments: ModelArguments, *, sequences: int = 2, length: int = 64) -> Tensor:
    """Return ``[sequences, length]`` token ids over the whole vocabulary: always the same, no longer than allowed."""
    generator = torch.Generator().manual_seed(0)
    length = min(length, arguments.max_position_embeddings)
    return torch.randint(arguments.vocab_size, (sequences, length), generator=generator)


def prompt_token_ids(
    prompts: Sequence[str | Sequence[int]], hf_dir: str | Path, arguments: ModelArguments
) -> list[Tensor]:
    """Return ``[1, s]`` token ids of every prompt: texts go through the HF directory's tokenizer, lists are token ids.

    Raises:
        OISDError: there is no tokenizer for a text, or a prompt is empty, too long or has ids beyond the vocabulary.
    """
    found = []
    tokenizer: Any = load_tokenizer(hf_dir) if any(isinstance(prompt, str) for prompt in prompts) else None
    for prompt in prompts:
        if isinstance(prompt, str) and tokenizer is None:
            raise OISDError(f"{hf_dir} has no tokenizer for the prompt {prompt[:40]!r}: give token ids instead")
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not 0 < len(ids) <= arguments.max_position_embeddings:
            raise OISDError(
                f"prompt {str(prompt)[:40]!r} has {len(ids)} tokens, expected 1 to {arguments.max_position_embeddings}"
            )
        if not all(0 <= token < arguments.vocab_size for token in ids):
            raise OISDError(f"prompt {str(prompt)[:40]!r} has token ids outside 0..{arguments.vocab_size - 1}")
        found.append(torch.tensor([ids]))
    return found


@torch.no_grad()
def compare_logits(
    hf_dir: str | Path,
    mcore_dir: str | Path,
    token_ids: Tensor | Sequence[Tensor],
    iteration: int | None = None,
    *,
    round_to: torch.dtype | None = None,
) -> LogitComparison:
    """Compare an HF checkpoint with a Megatron checkpoint, in float32 and one after the other.

    Args:
        hf_dir: directory in HF format.
        mcore_dir: Megatron checkpoint directory.
        token_ids: ``[b, s]``, int64, or several of those.
        iteration: of the Megatron checkpoint; None for the latest.
        round_to: round both models' weights to this dtype first, for a conversion that narrowed them.

    Raises:
        OISDError: a checkpoint cannot be read. Disagreement is not an error here, see :attr:`LogitComparison.agree`.
    """
    batches = [token_ids] if isinstance(token_ids, Tensor) else list(token_ids)
    arguments = read_arguments(mcore_dir)
    with single_process():
        theirs = _hf_logits(hf_dir, batches, round_to)
        ours = _megatron_logits(mcore_dir, arguments, batches, iteration, round_to)
    max_abs = largest = 0.0
    same = 0
    for hf, megatron in zip(theirs, ours, strict=True):
        if hf.shape != megatron.shape:
            raise OISDError(
                f"{hf_dir} gives logits of shape {tuple(hf.shape)}, {mcore_dir} of {tuple(megatron.shape)}: the two "
                f"directories hold different models"
            )
        difference = (hf - megatron).abs().max().item()
        max_abs = difference if difference > max_abs or math.isnan(difference) else max_abs
        largest = max(largest, hf.abs().max().item())
        same += int((hf.argmax(-1) == megatron.argmax(-1)).sum())
    return LogitComparison(
        max_abs=max_abs,
        max_rel=max_abs / largest if largest else max_abs,
        largest_logit=largest,
        tokens=sum(batch.numel() for batch in batches),
        same_argmax=same,
    )


@contextmanager
def single_process() -> Iterator[None]:
    """Megatron's parallel state for one process, undone afterwards unless the caller had set it up already.

    Raises:
        OISDError: there is more than one rank.
    """
    from megatron.core import parallel_state

    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world != 1:
        raise OISDError(f"conversion runs in one process, and the world has {world} ranks: start it without torchrun")
    if parallel_state.is_initialized():
        yield
        return
    had_shim, had_group = cpu.is_installed(), dist.is_initialized()
    initialize()
    try:
        yield
    finally:
        if had_group:
            parallel_state.destroy_model_parallel()
        else:
            shutdown()
        if not had_shim:
            cpu.uninstall()


def _round(model: nn.Module, dtype: torch.dtype | None) -> None:
    for parameter in model.parameters() if dtype else ():
        parameter.copy_(parameter.to(dtype))


def _hf_logits(directory: str | Path, batches: list[Tensor], round_to: torch.dtype | None) -> list[Tensor]:
    """``[b, s, vocabulary]`` float32 on the CPU, of every batch."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    except Exception as error:
        raise OISDError(f"transformers cannot load {directory}: {str(error).splitlines()[0]}") from error
    _round(model, round_to)
    device = _device()
    model = model.to(device).eval()
    return [model(batch.to(device)).logits.float().cpu() for batch in batches]


def _megatron_logits(
    directory: str | Path,
    arguments: ModelArguments,
    batches: list[Tensor],
    iteration: int | None,
    round_to: torch.dtype | None,
) -> list[Tensor]:
    """``[b, s, vocabulary]`` float32 on the CPU, padded columns cut, of every batch."""
    config = transformer_config(arguments, perform_initialization=False)
    (model,) = build_model(arguments, config)
    load_model([model], directory, iteration)
    _round(model, round_to)
    device = _device()
    model = model.to(device).eval()
    logits = []
    for batch in batches:
        ids = batch.to(device)
        found = model(ids, torch.arange(ids.shape[1], device=device).expand_as(ids), None)
        logits.append(found[..., : arguments.vocab_size].float().cpu())
    return logits


def _device() -> torch.device:
    return torch.device("cpu") if cpu.is_needed() else torch.device("cuda", torch.cuda.current_device())
