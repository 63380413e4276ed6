"""Megatron's DDP overlaps the reduction of gradients with backward and the gathering of parameters with forward.

The lens stands across both. Its gradient of the final norm and the unembedding comes from another stage, after this
stage's own backward, when the bucket with those parameters has long been reduced; and it reads them for the replicas
before the forward that would gather them. So the buckets that hold them are reduced a little later
(:class:`HeldBuckets`) and gathered a little earlier (:func:`gather_parameters`); all others overlap as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn


def bucket_groups(chunks: Sequence[nn.Module], parameters: Sequence[Tensor]) -> list[Any]:
    """DDP's bucket groups that hold any of ``parameters``; none for chunks without DDP."""
    groups: list[Any] = []
    for chunk in chunks:
        table = getattr(chunk, "param_to_bucket_group", None) or {}
        for parameter in parameters:
            group = table.get(parameter)
            if group is not None and all(group is not other for other in groups):
                groups.append(group)
    return groups


def gather_parameters(chunks: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
    """Finish the parameter all-gather of these parameters' buckets; a collective of their data-parallel ranks.

    Nothing to do unless DDP gathers them in the next forward (``overlap_param_gather``).
    """
    for group in bucket_groups(chunks, parameters):
        if group.ddp_config.overlap_param_gather:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


class HeldBuckets:
    """Keeps the reduction of some buckets waiting between :meth:`hold` and :meth:`release`.

    Args:
        chunks: the model chunks, in DDP or not.
        parameters: whose buckets.
    """

    def __init__(self, chunks: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
        self._groups = [group for group in bucket_groups(chunks, parameters) if group.ddp_config.overlap_grad_reduce]
        self._holding = False
        self._waiting: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        for group in self._groups:
            # What is there may be another instance's: each holds for itself.
            group.start_grad_sync = partial(self._start, group.start_grad_sync)

    def _start(self, start: Any, *args: Any, **kwargs: Any) -> None:
        if self._holding:
            self._waiting.append((start, args, kwargs))
        else:
            start(*args, **kwargs)

    def hold(self) -> None:
        """From now on reductions of these buckets wait."""
        self._holding, self._waiting = True, []

    def release(self) -> None:
        """Start what was held, in the order in which DDP asked for it."""
        self._holding, waiting, self._waiting = False, self._waiting, []
        for start, args, kwargs in waiting:
            start(*args, **kwargs)

    def drop(self) -> None:
        """Stop holding and forget what was held: the step was abandoned."""
        self._holding, self._waiting = False, []

    def remove(self) -> None:
        """Give the bucket groups back what they had; inside somebody's later wrapper ours only passes on."""
        self.drop()
        for group in self._groups:
            ours = group.__dict__.get("start_grad_sync")
            if getattr(ours, "func", None) == self._start:
                group.start_grad_sync = ours.args[0]
