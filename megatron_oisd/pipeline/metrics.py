"""OISD's metrics: collected where a student lives, equal on every rank once reduced."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.losses.numerics import Group, group_size
from megatron_oisd.pipeline.channel import Traffic

_FIELDS = ("signed", "unsigned", "weight", "share")


class Metrics:
    """Sums of per-token values by (kind, layer), until they are reduced.

    Args:
        kinds: the losses that are on, of ``"think"`` and ``"attn"``; the same on every rank.
        layers: student layers counted from 1; likewise.
        device: where the sums live; nothing is copied to the host before :meth:`reduce`.
        traffic: the rank's counter of bytes and waiting.
    """

    def __init__(
        self, kinds: tuple[str, ...], layers: tuple[int, ...], device: torch.device, traffic: Traffic | None = None
    ) -> None:
        self.kinds, self.layers = kinds, layers
        self.traffic = traffic if traffic is not None else Traffic()
        self._steps = 0
        self._row = {(kind, layer): i for i, (kind, layer) in enumerate((k, n) for k in kinds for n in layers)}
        self._sums = torch.zeros(len(self._row), len(_FIELDS), dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(self._row), dtype=torch.float64, device=device)

    def add(
        self, kind: str, layer: int, values: Tensor, coefficients: Tensor, shares: Tensor, count: float
    ) -> None:  # fmt: skip
        """Add one microbatch.

        Args:
            kind: ``"think"`` or ``"attn"``.
            layer: student layer, counted from 1.
            values: ``[N]`` divergences.
            coefficients: ``[N]`` signed share of each in the loss times what ``count`` adds up to over the step.
            shares: ``[N]`` unsigned share of each in the mean divergence.
            count: the microbatch's part of the denominator.
        """
        row = self._row[kind, layer]
        update = [(coefficients * values).sum(), (shares * values).sum(), coefficients.sum(), shares.sum()]
        self._sums[row] += torch.stack(update).to(self._sums.dtype)
        self._counts[row] += count

    def count_step(self) -> None:
        """One more step was finished."""
        self._steps += 1

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """The sums so far, for :meth:`restore`."""
        return self._sums.clone(), self._counts.clone()

    def restore(self, snapshot: tuple[Tensor, Tensor]) -> None:
        """Go back to a snapshot: the step was abandoned."""
        self._sums.copy_(snapshot[0])
        self._counts.copy_(snapshot[1])

    def reset(self) -> None:
        """Drop all sums."""
        self._sums.zero_()
        self._counts.zero_()
        self._steps = 0

    def reduce(self, *, tp_group: Group, pp_group: Group, dp_group: Group) -> dict[str, float]:
        """Metrics of everything added since the last reset, equal on every rank; then reset.

        ``oisd/transport/teacher_bytes`` and ``.../lens_bytes`` are what all ranks sent in a step on average,
        ``.../buffers`` the most send buffers that any channel held, ``timing_s/oisd_wait`` the seconds a step that the
        rank that waited longest waited for teachers.

        Collectives: two all-reduces over each of the groups that has more than one rank.
        """
        packed = torch.cat([self._sums, self._counts.unsqueeze(1)], dim=1)
        # Every tensor-parallel rank counted the same tokens; attention values are means over its own heads.
        packed /= group_size(tp_group)
        steps, traffic = max(self._steps, 1), self.traffic.read()
        sent = packed.new_tensor([traffic.teacher_bytes / steps, traffic.lens_bytes / steps])
        largest = packed.new_tensor([traffic.wait_s / steps, traffic.most_buffers])
        packed = torch.cat([packed.flatten(), sent])
        for group in (tp_group, pp_group, dp_group):
            if group_size(group) > 1:
                dist.all_reduce(packed, group=group)
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        self.reset()
        result: dict[str, float] = {}
        teacher_bytes, lens_bytes = packed[-2:].tolist()
        rows = packed[:-2].view(len(self._row), -1).tolist()
        for (kind, layer), row in self._row.items():
            signed, unsigned, weight, share, count = rows[row]
            js = "js" if kind == "think" else "attn_js"
            result[f"oisd/{kind}/layer_{layer}"] = signed / count if count else 0.0
            result[f"oisd/{js}/layer_{layer}"] = unsigned / share if share else 0.0
            result[f"oisd/{kind}_weight/layer_{layer}"] = weight / count if count else 0.0
        for kind in self.kinds:
            by_layer = [result[f"oisd/{kind}/layer_{layer}"] for layer in self.layers]
            result[f"oisd/{kind}"] = sum(by_layer) / len(by_layer)
        result["oisd/transport/teacher_bytes"], result["oisd/transport/lens_bytes"] = teacher_bytes, lens_bytes
        result["timing_s/oisd_wait"], result["oisd/transport/buffers"] = largest.tolist()
        return result
