"""The vocabulary of the family table: what a rule, the HF tensors that it names, and a family are.

:mod:`megatron_oisd.convert.families` holds the table itself, ``docs/families.md`` says how to add to it.

Layouts (``[rows, columns]``; a bias has no columns; TP shards are slices of axis ``tp_axis``):

* ``copy``: the HF tensor itself.
* ``vocabulary``: the HF tensor with zero rows appended up to the padded vocabulary.
* ``qkv``: for every query group in turn, the query heads of the group, its key head, its value head. A TP shard is a
  slice of whole groups.
* ``gate_up``: a TP shard is its slice of the gate followed by its slice of the up projection, so that the whole
  parameter is **not** the concatenation of gate and up as soon as TP is larger than 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_oisd.runtime.model import ModelArguments

LAYER = "{layer}"
"""Placeholder of the layer number in a name: 0-based in both worlds."""

EXPERT = "{expert}"
"""Placeholder of the expert number in a name: 0-based; of the whole model in a table, of the rank in a live model."""

Layout = Literal["copy", "vocabulary", "qkv", "gate_up"]


@dataclass(frozen=True)
class Fused:
    """An HF tensor ``[experts, ...]`` that holds the same part of all experts of a layer."""

    name: str
    part: int = 0
    """Which of ``parts`` equal slices of axis 1 is meant."""
    parts: int = 1


@dataclass(frozen=True)
class Source:
    """One HF tensor: its name and its shape in symbols (keys of :func:`families.dimensions`)."""

    name: str
    shape: tuple[str, ...]
    fused: Fused | None = None
    """Where the tensor is found in checkpoints that hold the experts fused; read, never written."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One Megatron parameter and the HF tensors it is made of."""

    megatron: tuple[str, ...]
    """Names of the parameter: local spec first, then Transformer Engine's modules where they differ."""
    hf: tuple[Source, ...]
    layout: Layout = "copy"
    tp_axis: int | None = None
    """Axis of the parameter that is split over the tensor-parallel ranks (the expert-tensor-parallel ones for an
    expert's parameter); None when every rank holds all of it."""
    when: str | None = None
    """The rule applies where this boolean field of ``ModelArguments`` is true; None for always."""
    copy_of: str | None = None
    """Set on a tied copy: the parameter repeats the HF tensors of this other one, is filled but never exported."""
    unless: str | None = None
    """The rule applies where this boolean field of ``ModelArguments`` is false."""
    mlp: Literal["dense", "experts"] | None = None
    """The rule applies in layers with this kind of MLP; None for all layers."""
    expert: int | None = None
    """Number of the expert in the whole model, set by :meth:`of_expert`."""
    pattern: str = ""
    """The parameter's first name with its placeholders, set by :meth:`of_expert`."""

    @property
    def per_layer(self) -> bool:
        """Whether the rule stands for one parameter in every layer."""
        return LAYER in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        """Whether the rule stands for one parameter of every expert."""
        return EXPERT in self.key

    @property
    def key(self) -> str:
        """The parameter's first name with its placeholders: equal for all layers and experts."""
        return self.pattern or self.megatron[0]

    def of_expert(self, expert: int) -> Rule:
        """Return the rule of one expert: a copy in which its number stands in the place of the placeholder."""
        number = str(expert)
        return dataclasses.replace(
            self,
            megatron=tuple(name.replace(EXPERT, number) for name in self.megatron),
            hf=tuple(dataclasses.replace(source, name=source.name.replace(EXPERT, number)) for source in self.hf),
            expert=expert,
            pattern=self.key,
        )

    def applies(self, arguments: ModelArguments) -> bool:
        """Whether a model of this shape has the parameter, in some layer at least."""
        wanted = self.when is None or bool(getattr(arguments, self.when))
        wanted = wanted and not (self.unless is not None and getattr(arguments, self.unless))
        return wanted and (not self.per_layer or any(self.in_layer(arguments, i) for i in range(arguments.num_layers)))

    def in_layer(self, arguments: ModelArguments, layer: int) -> bool:
        """Whether the 0-based ``layer`` has the MLP that the rule speaks of."""
        return self.mlp is None or (self.mlp == "experts") == arguments.has_experts(layer)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One HF architecture."""

    model_type: str
    """``model_type`` of its ``config.json``, by which transformers chooses the class."""
    rules: tuple[Rule, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``ModelArguments`` that the architecture decides and ``config.json`` does not mention."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where ``config.json`` does not have the key."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of ``config.json`` that, where present, must have one of these values, because Megatron's side has no
    counterpart of another."""
    window: Literal["none", "every_layer", "by_layer"] = "none"
    """Which layers ``sliding_window`` is for: none, all, or those that ``layer_types`` or ``max_window_layers`` say."""
    experts: bool = False
    """Whether ``config.json`` describes experts in Qwen's keys (``num_experts_per_tok``, ``mlp_only_layers``, ...)."""
