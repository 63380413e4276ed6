"""The reference model of a KL term: the weights that a run started from, kept on the CPU and swapped in when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ReferenceModel:
    """A copy of the chunks' weights as they are now, in host memory: no second model on the device.

    Args:
        chunks: this rank's model chunks, holding the reference's weights.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        pinned = bool(self._parameters) and self._parameters[0].is_cuda
        self._stored: list[Tensor] = []
        for parameter in self._parameters:
            copy = parameter.detach().cpu().clone()
            self._stored.append(copy.pin_memory() if pinned else copy)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The chunks hold the reference's weights within the block, and exactly their own after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, stored in zip(self._parameters, self._stored, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(stored)
            stored.copy_(own)
