"""Autograd functions that are the identity in forward and add a gradient of their own in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    """The same storage as a new, viewless tensor: Megatron frees stage outputs and refuses views there."""
    result = torch.empty((0,), dtype=tensor.dtype, device=tensor.device)
    result.data = tensor.data
    return result


class HiddenTap(torch.autograd.Function):
    """Identity on a layer's output; backward hands the arriving gradient to ``add`` and returns what it makes of it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, saved: Tensor, add: Callable[[Tensor, Tensor], Tensor], anchor: Tensor | None
    ) -> Tensor:
        """Pass ``hidden`` through; ``saved`` is what the loss will need of it (selected rows, not the whole).

        ``anchor`` requires a gradient where ``hidden`` does not (:func:`anchor`), so that backward comes by.
        """
        ctx.save_for_backward(saved)
        ctx.add = add
        return _same(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return upstream plus local gradient."""
        (saved,) = ctx.saved_tensors
        return ctx.add(grad_outputs[0], saved), None, None, None


def anchor(*tensors: Tensor) -> Tensor | None:
    """Something that requires a gradient, where none of ``tensors`` does: all below a tap is frozen.

    Then the tap's gradient moves nothing below it, but the unembedding may be trained, the metrics are wanted and the
    teacher under way must be received.
    """
    if any(tensor.requires_grad for tensor in tensors):
        return None
    return torch.zeros((), device=tensors[0].device, requires_grad=True)


class AttentionTap(torch.autograd.Function):
    """Identity on an attention output whose backward also gives gradients to the query and key that made it.

    It hangs on the *output* of core attention, so the attention itself sees its inputs untouched, whatever its backend
    and whether or not it is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        local: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        anchor: Tensor | None,
    ) -> Tensor:
        """Pass ``output`` through and remember query and key."""
        ctx.save_for_backward(query, key)
        ctx.local = local
        return _same(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the arriving gradient for the output and the local ones for query and key."""
        query, key = ctx.saved_tensors
        query_gradient, key_gradient = ctx.local(query, key)
        return grad_outputs[0], query_gradient, key_gradient, None, None
