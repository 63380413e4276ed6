"""The configuration of the two OISD losses: a frozen, validated dataclass and the ``--oisd-*`` arguments made from it.

Every value's source is in ``docs/paper_map.md``. Layers are counted from 1, as in the paper; :func:`layer_index` is the
one place where that becomes a decoder index.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_oisd.errors import OISDError


def layer_index(layer: int) -> int:
    """Decoder index (from 0) of a layer counted from 1; HF's ``hidden_states[layer]`` is its output."""
    return layer - 1


@dataclass(frozen=True, kw_only=True)
class OISDConfig:
    """What OISD adds to the policy loss: ``L = L_GRPO + lambda_think * L_think + lambda_attn * L_attn``.

    Raises:
        OISDError: a value is out of its range; the message names the field.
    """

    layers: tuple[int, ...] = field(metadata={"help": "student layers, counted from 1, each below the last layer"})
    """Student layers, counted from 1; each must be at most ``num_layers - 1``."""
    lambda_think: float = field(default=1.0, metadata={"help": "weight of the logit alignment loss; 0 switches it off"})
    """Weight of the logit alignment ("how to think") loss. 0 is exactly plain GRPO."""
    lambda_attn: float = field(
        default=0.1, metadata={"help": "weight of the attention alignment loss; 0 switches it off"}
    )
    """Weight of the attention alignment ("where to look") loss."""
    temperature: float = field(default=1.0, metadata={"help": "softmax temperature tau of student and teacher"})
    """Temperature tau of both the student's and the teacher's distribution."""
    advantage_clip: float = field(default=1.0, metadata={"help": "advantages are clipped to [-c, c]; inf: no clipping"})
    """c in ``w_t = clip(A_t, -c, c)``."""
    advantage_weighting: Literal["signed", "absolute", "none"] = field(
        default="signed",
        metadata={
            "help": "weight of a token: signed (OISD), absolute (always pulls), none (1 for every token)",
            "choices": ("signed", "absolute", "none"),
        },
    )
    """Whether a bad rollout pushes the student away from the teacher. All but ``signed`` are for comparison."""
    attn_window: int = field(default=32, metadata={"help": "newest keys compared for each query"})
    """Number of newest causal keys (the query's own position included) in a query's sampled key set."""
    attn_global_keys: int = field(default=32, metadata={"help": "equally spaced older keys compared for each query"})
    """Number of equally spaced keys among those older than the window."""
    attn_queries: int = field(default=128, metadata={"help": "response positions sampled as queries per sequence"})
    """Number of response positions sampled per sequence; shorter responses use all of theirs."""
    head_gradient: bool = field(
        default=True, metadata={"help": "let the logit-lens loss train the final norm and the unembedding as well"}
    )
    """Whether final norm and unembedding receive the lens gradient, as plain autograd would give it."""
    teacher_payload: Literal["hidden", "logits", "topk"] = field(
        default="hidden",
        metadata={
            "help": "what of the final distribution goes to the student's stage: hidden states (exact and smallest), "
            "logits (exact), topk (lossy)",
            "choices": ("hidden", "logits", "topk"),
        },
    )
    """What the last stage hands over: final hidden states after the norm (the logits are made again from them, exact),
    the logits of each vocabulary shard (exact, saves the student's stage one matrix product), or the ``teacher_topk``
    most likely tokens and a tail bucket (lossy, see :mod:`megatron_oisd.losses.js_topk`)."""
    teacher_topk: int = field(default=256, metadata={"help": "tokens of a topk teacher"})
    """Tokens that a top-k teacher keeps; used with ``teacher_payload="topk"`` only."""
    aggregation: Literal["sequence", "token"] = field(
        default="sequence",
        metadata={
            "help": "sequence: mean over rollouts of the mean over tokens; token: mean over all tokens",
            "choices": ("sequence", "token"),
        },
    )
    """How per-token values become one number over the global batch."""
    seed: int = field(default=1234, metadata={"help": "seed of the sampled attention queries"})
    """Seed of the sampled attention query positions."""
    chunk_tokens: int = field(default=1024, metadata={"help": "tokens whose vocabulary logits exist at one time"})
    """Tokens per chunk of the logit-lens loss: bounds its memory at ``chunk_tokens * vocab_size / TP`` floats."""

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Iterable) or isinstance(self.layers, str):
            raise OISDError(
                f"layers is {self.layers!r}: expected a sequence of layers counted from 1, e.g. layers=(6,)"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("lambda_think", "lambda_attn", "temperature", "advantage_clip"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise OISDError(f"{name} is {value!r}: expected a number")
        if not isinstance(self.head_gradient, bool):
            raise OISDError(f"head_gradient is {self.head_gradient!r}: expected True or False")
        if not self.layers:
            raise OISDError("layers is empty: expected at least one student layer counted from 1, e.g. layers=(6,)")
        for layer in self.layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or layer < 1:
                raise OISDError(f"layers holds {layer!r}: expected integers counted from 1")
        if len(set(self.layers)) != len(self.layers):
            raise OISDError(f"layers is {list(self.layers)}: a layer is named twice, name each once")
        for name in ("lambda_think", "lambda_attn"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise OISDError(f"{name} is {value}: expected a finite number of at least 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise OISDError(f"temperature is {self.temperature}: expected a finite number above 0")
        if not self.advantage_clip > 0:
            raise OISDError(f"advantage_clip is {self.advantage_clip}: expected a number above 0 (inf: no clipping)")
        for name, least in (
            ("attn_window", 1),
            ("attn_global_keys", 0),
            ("attn_queries", 1),
            ("chunk_tokens", 1),
            ("teacher_topk", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise OISDError(f"{name} is {value!r}: expected an integer of at least {least}")
        for item in dataclasses.fields(self):
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            if choices and value not in choices:
                raise OISDError(f"{item.name} is {value!r}: expected {' or '.join(map(repr, choices))}")

    def validate_layers(self, num_layers: int) -> None:
        """Raise :class:`OISDError` unless every student layer is within ``1..num_layers - 1``."""
        for layer in self.layers:
            if layer >= num_layers:
                raise OISDError(
                    f"student layer {layer} is outside 1..{num_layers - 1}: the model has {num_layers} layers and the "
                    f"last one is the teacher; choose --oisd-layers within 1..{num_layers - 1}"
                )

    @property
    def enabled(self) -> bool:
        """Whether any of the two losses has a non-zero weight."""
        return self.lambda_think > 0 or self.lambda_attn > 0


def add_arguments(parser: argparse.ArgumentParser, *, default_layers: Sequence[int] | None = None) -> None:
    """Add one ``--oisd-*`` argument per :class:`OISDConfig` field to ``parser``."""
    group = parser.add_argument_group("OISD")
    for item in dataclasses.fields(OISDConfig):
        flag, help_text = "--oisd-" + item.name.replace("_", "-"), item.metadata["help"]
        if item.name == "layers":
            group.add_argument(
                flag, type=int, nargs="+", metavar="L", default=default_layers, required=default_layers is None,
                help=help_text,
            )  # fmt: skip
        elif isinstance(item.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=item.default, help=help_text)
        elif "choices" in item.metadata:
            group.add_argument(flag, choices=item.metadata["choices"], default=item.default, help=help_text)
        else:
            group.add_argument(flag, type=type(item.default), default=item.default, help=help_text)


def config_from_arguments(arguments: argparse.Namespace) -> OISDConfig:
    """Make the configuration from parsed ``--oisd-*`` arguments."""
    values: dict[str, Any] = {
        item.name: getattr(arguments, f"oisd_{item.name}") for item in dataclasses.fields(OISDConfig)
    }
    return OISDConfig(**{**values, "layers": tuple(values["layers"])})
