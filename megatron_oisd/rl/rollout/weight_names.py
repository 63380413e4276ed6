"""Checks on the weights that are streamed into an engine: every tensor of the model comes exactly once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.convert.fused import split_views
from megatron_oisd.errors import OISDError


class ExpectedWeights:
    """The names and shapes of a model's tensors.

    Args:
        tensors: a model's ``state_dict(keep_vars=True)``, on any device, with its experts one by one
            (:func:`~megatron_oisd.convert.fused.split_views`); tied names share one object.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        tied: dict[int, list[str]] = defaultdict(list)
        for name, tensor in tensors.items():
            tied[id(tensor)].append(name)
        self._groups = list(tied.values())
        self._group_of = {name: group for group in self._groups for name in group}

    @classmethod
    def from_hf_config(cls, config: Any) -> ExpectedWeights:
        """Those of the transformers model of a configuration; no weights are made."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return cls(split_views(model.state_dict(keep_vars=True)))

    def tied_with(self, name: str) -> list[str]:
        """All names of the tensor that ``name`` names."""
        return self._group_of[name]

    def checked(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass ``(HF name, full tensor)`` pairs through.

        Of tied names (``lm_head.weight`` and the embedding) one is enough.

        Raises:
            OISDError: a name is unknown, repeated or missing at the end, or a shape differs.
        """
        seen: set[str] = set()
        for name, tensor in tensors:
            if name not in self._shapes:
                raise OISDError(
                    f"weight {name!r} is unknown to the rollout model; expected names such as "
                    f"{next(iter(self._shapes))!r}"
                )
            if name in seen:
                raise OISDError(f"weight {name!r} came twice in one refresh; send each name once")
            if tensor.shape != self._shapes[name]:
                raise OISDError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, the rollout model expects "
                    f"{tuple(self._shapes[name])}; send the full unsharded tensor of the same architecture"
                )
            seen.add(name)
            yield name, tensor
        missing = [names[-1] for names in self._groups if seen.isdisjoint(names)]
        if missing:
            raise OISDError(f"{len(missing)} weights missing from the refresh, first {missing[0]!r}; send every tensor")
