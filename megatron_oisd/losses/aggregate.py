r"""How the losses of tokens become one number over the global batch, as a weight for each token.

With the mask m of response tokens [B, s], n_b = sum_t m_bt, N the number of tokens and S that of sequences that have
any (all over the global batch, whatever microbatch or data-parallel rank they are in):

    token-mean               1 / N                      DAPO; every token counts the same
    seq-mean-token-mean      1 / (S n_b)                GRPO as published; every sequence counts the same
    seq-mean-token-sum       1 / S
    seq-mean-token-sum-norm  1 / (S L), L a constant    Dr. GRPO: no bias towards long wrong answers

The names are verl's.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def token_weights(mask: Tensor, mode: str, *, max_response_tokens: int) -> Tensor:
    """Weight of every token relative to the token mean: the loss is ``sum(w * l) / N``.

    Relative to it because Megatron divides gradients by N (``calculate_per_token_loss``); exactly 1 for ``token-mean``.

    Args:
        mask: ``[B, s]`` bool, the response tokens of the whole global batch.
        mode: one of :data:`AGGREGATIONS`.
        max_response_tokens: L of ``seq-mean-token-sum-norm``.

    Returns:
        ``[B, s]`` fp32, 0 outside the mask.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"loss aggregation {mode!r}: expected one of {', '.join(AGGREGATIONS)}")
    lengths = mask.sum(1, keepdim=True).double()
    tokens, sequences = lengths.sum(), (lengths > 0).sum().clamp_min(1)
    by_sequence = {
        "token-mean": torch.ones_like(lengths),
        "seq-mean-token-mean": tokens / (sequences * lengths.clamp_min(1)),
        "seq-mean-token-sum": (tokens / sequences).expand_as(lengths),
        "seq-mean-token-sum-norm": (tokens / (sequences * max_response_tokens)).expand_as(lengths),
    }[mode]
    return (by_sequence * mask).float()
