"""Entropy, Jensen-Shannon divergence and the logit lens, over many rows and never with all logits in memory.

Shapes: n rows (positions), h hidden size, V vocabulary, H heads, s positions. Everything is in nats and float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25
"""Most logits in memory at once, 128 MiB in float32; a few tensors of that size exist at a time."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Cut ``rows`` so that no piece has more than :data:`CHUNK_ELEMENTS` elements, and one row at least."""
    size = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def log_policy(hidden: Tensor, unembedding: Tensor) -> Tensor:
    """Return ``log softmax(hidden E_u^T)``, ``[n, V]``; ``hidden`` is ``[n, h]`` and normed already, if at all."""
    return torch.log_softmax(hidden.float() @ unembedding.T, dim=-1)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Return ``-sum p log p`` of rows ``[n, V]``; a probability of 0 adds 0."""
    probs = log_probs.exp()
    return -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1)


def js_of(p: Tensor, q: Tensor) -> Tensor:
    """Return ``JS(p, q)`` over the last axis of probabilities; zeros on either side are exact.

    ``JS = KL(p||m)/2 + KL(q||m)/2``, ``m = (p + q)/2``; between 0 and ln 2.
    """
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)
    return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1).clamp_min(0) / 2


def lens_entropy(hidden: Tensor, unembedding: Tensor) -> Tensor:
    """Return the entropy of the policy of each row of ``hidden`` ``[n, h]``: ``[n]``."""
    pieces = [entropy_of(log_policy(hidden[rows], unembedding)) for rows in row_chunks(len(hidden), len(unembedding))]
    return torch.cat(pieces)


def lens_against_teacher(
    student: Tensor, teacher: Tensor, unembedding: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare the policies of two normed hidden states row by row.

    Args:
        student: ``[n, h]``.
        teacher: ``[n, h]``, of the last layer.
        unembedding: ``[V, h]``.

    Returns:
        Of the student its entropy, its JS to the teacher, its most probable token and that token's probability; ``[n]``
        each.
    """
    entropies, distances, tokens, probabilities = [], [], [], []
    for rows in row_chunks(len(student), len(unembedding)):
        log_probs = log_policy(student[rows], unembedding)
        entropies.append(entropy_of(log_probs))
        probs = log_probs.exp()
        distances.append(js_of(probs, log_policy(teacher[rows], unembedding).exp()))
        best = probs.max(-1)
        tokens.append(best.indices)
        probabilities.append(best.values)
    return torch.cat(entropies), torch.cat(distances), torch.cat(tokens), torch.cat(probabilities)


def attention_js(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the JS between two layers' attention over all causal keys, mean over heads.

    Args:
        student: ``[H, s, s]`` probabilities, head by head.
        teacher: the same of the last layer.

    Returns:
        ``[s]``, one number for each query.
    """
    return torch.stack([js_of(p.float(), q.float()) for p, q in zip(student, teacher, strict=True)]).mean(0)
