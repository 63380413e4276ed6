"""Model families as data: which HF architectures are understood, and what each Megatron parameter is made of.

A family is a row of :data:`FAMILIES`: the keys of its ``config.json`` that must have a certain value, and its
:class:`Rule` table. A rule names one Megatron parameter, the HF tensors it holds and how they are laid out in it;
:mod:`megatron_oisd.convert.weights` executes rules in both directions and knows no family.

Layouts (``[rows, columns]``; a bias has no columns; TP shards are slices of axis ``tp_axis``):

* ``copy``: the HF tensor itself.
* ``vocabulary``: the HF tensor with zero rows appended up to the padded vocabulary.
* ``qkv``: for every query group in turn, the query heads of the group, its key head, its value head. A TP shard is a
  slice of whole groups.
* ``gate_up``: a TP shard is its slice of the gate followed by its slice of the up projection, so that the whole
  parameter is **not** the concatenation of gate and up as soon as TP is larger than 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

LAYER = "{layer}"
"""Placeholder of the layer number in a name: 0-based in both worlds."""

Layout = Literal["copy", "vocabulary", "qkv", "gate_up"]


@dataclass(frozen=True)
class Source:
    """One HF tensor: its name and its shape in symbols (keys of :func:`dimensions`)."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One Megatron parameter and the HF tensors it is made of."""

    megatron: tuple[str, ...]
    """Names of the parameter: local spec first, then Transformer Engine's fused modules where they differ."""
    hf: tuple[Source, ...]
    layout: Layout = "copy"
    tp_axis: int | None = None
    """Axis of the parameter that is split over the tensor-parallel ranks; None when every rank holds all of it."""
    when: str | None = None
    """The rule applies where this boolean field of ``ModelArguments`` is true; None for always."""
    copy_of: str | None = None
    """Set on a tied copy: the parameter repeats the HF tensors of this other one, is filled but never exported."""
    unless: str | None = None
    """The rule applies where this boolean field of ``ModelArguments`` is false."""

    @property
    def per_layer(self) -> bool:
        """Whether the rule stands for one parameter in every layer."""
        return LAYER in self.megatron[0]

    def applies(self, arguments: ModelArguments) -> bool:
        """Whether a model of this shape has the parameter."""
        wanted = self.when is None or bool(getattr(arguments, self.when))
        return wanted and not (self.unless is not None and getattr(arguments, self.unless))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One HF architecture."""

    rules: tuple[Rule, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``ModelArguments`` that the architecture decides and ``config.json`` does not mention."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of ``config.json`` that, where present, must have one of these values, because Megatron's side has no
    counterpart of another."""


_LAYER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"


def _qkv_rule(kind: str, tail: tuple[str, ...], when: str | None) -> Rule:
    return Rule(
        megatron=(f"{_LAYER}.self_attention.linear_qkv.{kind}",),
        hf=(
            Source(f"{_HF}.self_attn.q_proj.{kind}", ("query", *tail)),
            Source(f"{_HF}.self_attn.k_proj.{kind}", ("key_value", *tail)),
            Source(f"{_HF}.self_attn.v_proj.{kind}", ("key_value", *tail)),
        ),
        layout="qkv",
        tp_axis=0,
        when=when,
    )


_DENSE_DECODER = (
    Rule(
        megatron=("embedding.word_embeddings.weight",),
        hf=(Source("model.embed_tokens.weight", ("vocabulary", "hidden")),),
        layout="vocabulary",
        tp_axis=0,
    ),
    Rule(
        megatron=(f"{_LAYER}.input_layernorm.weight", f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight"),
        hf=(Source(f"{_HF}.input_layernorm.weight", ("hidden",)),),
    ),
    _qkv_rule("weight", ("hidden",), None),
    _qkv_rule("bias", (), "add_qkv_bias"),
    Rule(
        megatron=(f"{_LAYER}.self_attention.q_layernorm.weight",),
        hf=(Source(f"{_HF}.self_attn.q_norm.weight", ("head",)),),
        when="qk_layernorm",
    ),
    Rule(
        megatron=(f"{_LAYER}.self_attention.k_layernorm.weight",),
        hf=(Source(f"{_HF}.self_attn.k_norm.weight", ("head",)),),
        when="qk_layernorm",
    ),
    Rule(
        megatron=(f"{_LAYER}.self_attention.linear_proj.weight",),
        hf=(Source(f"{_HF}.self_attn.o_proj.weight", ("hidden", "query")),),
        tp_axis=1,
    ),
    Rule(
        megatron=(f"{_LAYER}.pre_mlp_layernorm.weight", f"{_LAYER}.mlp.linear_fc1.layer_norm_weight"),
        hf=(Source(f"{_HF}.post_attention_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        megatron=(f"{_LAYER}.mlp.linear_fc1.weight",),
        hf=(
            Source(f"{_HF}.mlp.gate_proj.weight", ("ffn", "hidden")),
            Source(f"{_HF}.mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        layout="gate_up",
        tp_axis=0,
    ),
    Rule(
        megatron=(f"{_LAYER}.mlp.linear_fc2.weight",),
        hf=(Source(f"{_HF}.mlp.down_proj.weight", ("hidden", "ffn")),),
        tp_axis=1,
    ),
    Rule(
        megatron=("decoder.final_layernorm.weight",),
        hf=(Source("model.norm.weight", ("hidden",)),),
    ),
    Rule(
        megatron=("output_layer.weight",),
        hf=(Source("lm_head.weight", ("vocabulary", "hidden")),),
        layout="vocabulary",
        tp_axis=0,
        when="untie_embeddings_and_output_weights",
    ),
    # The last pipeline stage's copy of tied embeddings, present only where it is not the first stage too.
    Rule(
        megatron=("output_layer.weight",),
        hf=(Source("model.embed_tokens.weight", ("vocabulary", "hidden")),),
        layout="vocabulary",
        tp_axis=0,
        unless="untie_embeddings_and_output_weights",
        copy_of="embedding.word_embeddings.weight",
    ),
)

_PLAIN = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0, None),
}

FAMILIES: dict[str, Family] = {
    "Qwen3ForCausalLM": Family(rules=_DENSE_DECODER, fixed={"qk_layernorm": True}, required=_PLAIN),
    "Qwen2ForCausalLM": Family(
        rules=_DENSE_DECODER, fixed={"qk_layernorm": False, "add_qkv_bias": True}, required=_PLAIN
    ),
    "LlamaForCausalLM": Family(
        rules=_DENSE_DECODER, fixed={"qk_layernorm": False}, required={**_PLAIN, "sliding_window": (None,)}
    ),
}

IGNORED_HF_SUFFIXES = ("rotary_emb.inv_freq",)
"""Ends of HF tensor names that hold no weight: old checkpoints store rotary frequencies."""


def dimensions(arguments: ModelArguments) -> dict[str, int]:
    """Sizes of the symbols in which :class:`Source` shapes are written."""
    return {
        "vocabulary": arguments.vocab_size,
        "hidden": arguments.hidden_size,
        "query": arguments.num_attention_heads * arguments.kv_channels,
        "key_value": arguments.num_query_groups * arguments.kv_channels,
        "head": arguments.kv_channels,
        "ffn": arguments.ffn_hidden_size,
    }


def rules_for(arguments: ModelArguments) -> list[Rule]:
    """Return the rules that apply to a model of this shape, in the order of its forward pass.

    Raises:
        OISDError: ``arguments.architecture`` is not in :data:`FAMILIES`.
    """
    return [rule for rule in _family(arguments.architecture).rules if rule.applies(arguments)]


def expand(arguments: ModelArguments) -> Iterator[tuple[Rule, int | None]]:
    """Yield every parameter of the whole model as (rule, 0-based layer or None), in the order of its forward pass."""
    rules = rules_for(arguments)
    first_layer_rule = next(i for i, rule in enumerate(rules) if rule.per_layer)
    last_layer_rule = max(i for i, rule in enumerate(rules) if rule.per_layer)
    yield from ((rule, None) for rule in rules[:first_layer_rule])
    for layer in range(arguments.num_layers):
        yield from ((rule, layer) for rule in rules[first_layer_rule : last_layer_rule + 1])
    yield from ((rule, None) for rule in rules[last_layer_rule + 1 :])


def hf_shapes(arguments: ModelArguments) -> dict[str, tuple[int, ...]]:
    """Return every HF tensor of the model, with its shape."""
    sizes = dimensions(arguments)
    return {
        numbered(source.name, layer): tuple(sizes[symbol] for symbol in source.shape)
        for rule, layer in expand(arguments)
        if rule.copy_of is None
        for source in rule.hf
    }


def numbered(name: str, layer: int | None) -> str:
    """Put the 0-based ``layer`` into a name that has the placeholder."""
    return name if layer is None else name.replace(LAYER, str(layer))


def arguments_from_hf_config(config: dict[str, Any]) -> ModelArguments:
    """Translate an HF ``config.json`` into Megatron's argument names.

    Args:
        config: the parsed file, of transformers 4 (``rope_theta``, ``rope_scaling``) or 5 (``rope_parameters``).

    Raises:
        OISDError: the architecture is not in :data:`FAMILIES`, a size is missing or impossible, or the model uses a
            feature without a counterpart here (scaled rotary embeddings, quantised weights, sliding windows, ...).
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise OISDError(
            f"config.json: architectures is {architectures!r}, expected one of {sorted(FAMILIES)}: use a causal-LM "
            f"checkpoint in HF format"
        )
    architecture = str(architectures[0])
    family = _family(architecture)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise OISDError(
                f"config.json has {key}: quantised weights cannot be trained, use the unquantised checkpoint"
            )
    for key, allowed in family.required.items():
        if key in config and config[key] not in allowed:
            raise OISDError(
                f"config.json: {key} is {config[key]!r}, and only {_one_of(allowed)} is supported for {architecture}"
            )
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise OISDError(f"config.json: layer_types has {sorted(layer_types)}, and only full_attention is supported")

    size = _size_reader(config)
    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    groups = size("num_key_value_heads", default=heads)
    if heads % groups:
        raise OISDError(
            f"config.json: num_attention_heads is {heads}, expected a multiple of num_key_value_heads ({groups})"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise OISDError(
            f"config.json: no head_dim, and num_attention_heads ({heads}) does not divide hidden_size {hidden}"
        )
    return ModelArguments(
        architecture=architecture,
        num_layers=size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=size("head_dim", default=hidden // heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        rotary_base=_rotary_base(config),
        layernorm_epsilon=_number(config, "rms_norm_eps"),
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        **family.fixed,
    )


def _family(architecture: str) -> Family:
    if architecture not in FAMILIES:
        raise OISDError(
            f"architecture {architecture!r} is not supported, expected one of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(dict.fromkeys(str(value) for value in values))


def _size_reader(config: dict[str, Any]) -> Callable[..., int]:
    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OISDError(f"config.json: {key} is {value!r}, expected an integer of at least 1")
        return value

    return size


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OISDError(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)


def _rotary_base(config: dict[str, Any]) -> float:
    """Rotary base from either generation of keys; only the unscaled kind is understood."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise OISDError(f"config.json: {key} has type {kind!r}, and only unscaled ('default') RoPE is supported")
        if rope.get("partial_rotary_factor", 1) not in (1, None):
            raise OISDError(
                f"config.json: {key} has partial_rotary_factor {rope['partial_rotary_factor']}, and only 1 is supported"
            )
    rope = config.get("rope_parameters") or {}
    return _number(rope if "rope_theta" in rope else config, "rope_theta")
