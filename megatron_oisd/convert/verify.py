"""Proves a conversion: both checkpoints are read back from disk and must give the same logits.

Weights are upcast to float32 on both sides, so that what is left is the order of summation: about 1e-6 of the largest
logit for a small model, growing with depth. A wrong layout, rotary base or missing bias is off by 1e-2 and more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.convert.checkpoint import load_model, read_arguments
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


@torch.no_grad()
def compare_logits(
    hf_dir: str | Path,
    mcore_dir: str | Path,
    token_ids: Tensor,
    iteration: int | None = None,
    *,
    round_to: torch.dtype | None = None,
) -> LogitComparison:
    """Compare an HF checkpoint with a Megatron checkpoint, in float32 and one after the other.

    Args:
        hf_dir: directory in HF format.
        mcore_dir: Megatron checkpoint directory.
        token_ids: ``[b, s]``, int64.
        iteration: of the Megatron checkpoint; None for the latest.
        round_to: round both models' weights to this dtype first, for a conversion that narrowed them.

    Raises:
        OISDError: a checkpoint cannot be read. Disagreement is not an error here, see :attr:`LogitComparison.agree`.
    """
    arguments = read_arguments(mcore_dir)
    with single_process():
        theirs = _hf_logits(hf_dir, token_ids, round_to)
        ours = _megatron_logits(mcore_dir, arguments, token_ids, iteration, round_to)
    if theirs.shape != ours.shape:
        raise OISDError(
            f"{hf_dir} gives logits of shape {tuple(theirs.shape)}, {mcore_dir} of {tuple(ours.shape)}: the two "
            f"directories hold different models"
        )
    max_abs, largest = (theirs - ours).abs().max().item(), theirs.abs().max().item()
    return LogitComparison(
        max_abs=max_abs,
        max_rel=max_abs / largest if largest else max_abs,
        largest_logit=largest,
        tokens=token_ids.numel(),
        same_argmax=int((theirs.argmax(-1) == ours.argmax(-1)).sum()),
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


def _hf_logits(directory: str | Path, token_ids: Tensor, round_to: torch.dtype | None) -> Tensor:
    """``[b, s, vocabulary]`` float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    except Exception as error:
        raise OISDError(f"transformers cannot load {directory}: {str(error).splitlines()[0]}") from error
    _round(model, round_to)
    device = _device()
    return model.to(device).eval()(token_ids.to(device)).logits.float().cpu()


def _megatron_logits(
    directory: str | Path,
    arguments: ModelArguments,
    token_ids: Tensor,
    iteration: int | None,
    round_to: torch.dtype | None,
) -> Tensor:
    """``[b, s, vocabulary]`` float32 on the CPU, padded columns cut."""
    config = transformer_config(arguments, perform_initialization=False)
    (model,) = build_model(arguments, config)
    load_model([model], directory, iteration)
    _round(model, round_to)
    device = _device()
    ids = token_ids.to(device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    logits = model.to(device).eval()(ids, positions, None)
    return logits[..., : arguments.vocab_size].float().cpu()


def _device() -> torch.device:
    return torch.device("cpu") if cpu.is_needed() else torch.device("cuda", torch.cuda.current_device())
