"""Model families as data: which HF architectures are understood, and what each Megatron parameter is made of.

A family is a row of :data:`FAMILIES`: the keys of its ``config.json`` that must have a certain value, and its
:class:`Rule` table. A rule names one Megatron parameter, the HF tensors it holds and how they are laid out in it;
:mod:`megatron_oisd.convert.weights` executes rules in both directions and knows no family. ``docs/families.md`` says
how to add one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_oisd.convert import hf_config
from megatron_oisd.convert.rules import EXPERT, LAYER, Family, Fused, Layout, Rule, Source
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

__all__ = [
    "EXPERT",
    "FAMILIES",
    "IGNORED_HF_SUFFIXES",
    "LAYER",
    "REFUSED",
    "Family",
    "Fused",
    "Layout",
    "Rule",
    "Source",
    "arguments_from_hf_config",
    "dimensions",
    "expand",
    "hf_shapes",
    "numbered",
    "rules_for",
]

_LAYER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"
_EXPERTS = f"{_LAYER}.mlp.experts"


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


DECODER = (
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
    # Transformer Engine fuses this norm into a dense MLP only.
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
        mlp="dense",
    ),
    Rule(
        megatron=(f"{_LAYER}.mlp.linear_fc2.weight",),
        hf=(Source(f"{_HF}.mlp.down_proj.weight", ("hidden", "ffn")),),
        tp_axis=1,
        mlp="dense",
    ),
    Rule(
        megatron=(f"{_LAYER}.mlp.router.weight",),
        hf=(Source(f"{_HF}.mlp.gate.weight", ("experts", "hidden")),),
        mlp="experts",
    ),
    Rule(
        megatron=(
            f"{_EXPERTS}.local_experts.{{expert}}.linear_fc1.weight",
            f"{_EXPERTS}.linear_fc1.weight{{expert}}",
        ),
        hf=(
            Source(
                f"{_HF}.mlp.experts.{{expert}}.gate_proj.weight",
                ("expert_ffn", "hidden"),
                Fused(f"{_HF}.mlp.experts.gate_up_proj", part=0, parts=2),
            ),
            Source(
                f"{_HF}.mlp.experts.{{expert}}.up_proj.weight",
                ("expert_ffn", "hidden"),
                Fused(f"{_HF}.mlp.experts.gate_up_proj", part=1, parts=2),
            ),
        ),
        layout="gate_up",
        tp_axis=0,
        mlp="experts",
    ),
    Rule(
        megatron=(
            f"{_EXPERTS}.local_experts.{{expert}}.linear_fc2.weight",
            f"{_EXPERTS}.linear_fc2.weight{{expert}}",
        ),
        hf=(
            Source(
                f"{_HF}.mlp.experts.{{expert}}.down_proj.weight",
                ("hidden", "expert_ffn"),
                Fused(f"{_HF}.mlp.experts.down_proj"),
            ),
        ),
        tp_axis=1,
        mlp="experts",
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
"""The rules of every family so far; which of them apply follows from the model's arguments."""

PLAIN = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0, None),
}
"""Keys of ``config.json`` that every family so far must have at these values."""

_DEFAULTS = {"rope_theta": 10000.0, "tie_word_embeddings": False}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 32}

FAMILIES: dict[str, Family] = {
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        rules=DECODER,
        fixed={"qk_layernorm": True},
        defaults={**_DEFAULTS, **_QWEN, "max_window_layers": 28, "head_dim": 128},
        required=PLAIN,
        window="by_layer",
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        rules=DECODER,
        fixed={"qk_layernorm": True},
        defaults={**_DEFAULTS, **_QWEN, "num_key_value_heads": 4, "decoder_sparse_step": 1, "norm_topk_prob": False},
        required=PLAIN,
        window="every_layer",
        experts=True,
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        rules=DECODER,
        fixed={"qk_layernorm": False, "add_qkv_bias": True},
        defaults={**_DEFAULTS, **_QWEN, "max_window_layers": 28},
        required=PLAIN,
        window="by_layer",
    ),
    "LlamaForCausalLM": Family(
        model_type="llama",
        rules=DECODER,
        fixed={"qk_layernorm": False},
        defaults=_DEFAULTS,
        required={**PLAIN, "sliding_window": (None,), "use_sliding_window": (False,)},
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        rules=DECODER,
        fixed={"qk_layernorm": False},
        defaults={**_DEFAULTS, "sliding_window": 4096, "num_key_value_heads": 8},
        required={**PLAIN, "use_sliding_window": (True,)},  # no key of this family: transformers would not read it
        window="every_layer",
    ),
}

REFUSED = {
    "DeepseekV2ForCausalLM": "it has multi-latent attention",
    "DeepseekV3ForCausalLM": "it has multi-latent attention",
    "Gemma2ForCausalLM": "its norms add 1 to their weight and its logits are capped",
    "Gemma3ForCausalLM": "its norms add 1 to their weight and its layers have two rotary bases",
    "GptOssForCausalLM": "its attention has sinks and its experts biases",
    "GPT2LMHeadModel": "its positions are learned",
    "MixtralForCausalLM": "its experts have names that no rule knows yet",
    "Phi3ForCausalLM": "its query, key and value are stored as one tensor, which no layout knows yet",
    "Qwen2MoeForCausalLM": "its shared expert has a gate, which no rule knows yet",
    "Qwen3NextForCausalLM": "it has linear attention",
}
"""Architectures that people may try, and what of theirs has no counterpart here."""

IGNORED_HF_SUFFIXES = ("rotary_emb.inv_freq",)
"""Ends of HF tensor names that hold no weight: old checkpoints store rotary frequencies."""


def dimensions(arguments: ModelArguments) -> dict[str, int]:
    """Sizes of the symbols in which :class:`Source` shapes are written; 0 for what the model does not have."""
    return {
        "vocabulary": arguments.vocab_size,
        "hidden": arguments.hidden_size,
        "query": arguments.num_attention_heads * arguments.kv_channels,
        "key_value": arguments.num_query_groups * arguments.kv_channels,
        "head": arguments.kv_channels,
        "ffn": arguments.ffn_hidden_size,
        "experts": arguments.num_experts or 0,
        "expert_ffn": arguments.moe_ffn_hidden_size or 0,
    }


def rules_for(arguments: ModelArguments) -> list[Rule]:
    """Return the rules that apply to a model of this shape, in the order of its forward pass.

    Raises:
        OISDError: ``arguments.architecture`` is not in :data:`FAMILIES`.
    """
    return [rule for rule in _family(arguments.architecture).rules if rule.applies(arguments)]


def expand(arguments: ModelArguments) -> Iterator[tuple[Rule, int | None]]:
    """Yield every parameter of the whole model as (rule, 0-based layer or None), in the order of its forward pass.

    An expert's parameters have a rule each, with the number of the expert in the whole model in their names.
    """
    rules = rules_for(arguments)
    first_layer_rule = next(i for i, rule in enumerate(rules) if rule.per_layer)
    last_layer_rule = max(i for i, rule in enumerate(rules) if rule.per_layer)
    of_layers = _experts_put_in(rules[first_layer_rule : last_layer_rule + 1], arguments.num_experts or 0)
    yield from ((rule, None) for rule in rules[:first_layer_rule])
    for layer in range(arguments.num_layers):
        yield from ((rule, layer) for rule in of_layers if rule.in_layer(arguments, layer))
    yield from ((rule, None) for rule in rules[last_layer_rule + 1 :])


def _experts_put_in(rules: list[Rule], num_experts: int) -> list[Rule]:
    """The rules of experts, next to each other in the table, repeated for one expert after the other."""
    found: list[Rule] = []
    of_experts = [rule for rule in rules if rule.per_expert]
    for rule in rules:
        if not rule.per_expert:
            found.append(rule)
        elif rule is of_experts[0]:
            found += [each.of_expert(number) for number in range(num_experts) for each in of_experts]
    return found


def hf_shapes(arguments: ModelArguments) -> dict[str, tuple[int, ...]]:
    """Return every HF tensor of the model, with its shape; experts one by one, as they are written."""
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
            feature without a counterpart here (other scaled rotary embeddings than Llama 3's, quantised weights, ...).
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise OISDError(
            f"config.json: architectures is {architectures!r}, expected one of {sorted(FAMILIES)}: use a causal-LM "
            f"checkpoint in HF format"
        )
    architecture = str(architectures[0])
    return hf_config.translate(config, architecture, _family(architecture))


def _family(architecture: str) -> Family:
    if architecture not in FAMILIES:
        reason = f" ({REFUSED[architecture]})" if architecture in REFUSED else ""
        raise OISDError(
            f"architecture {architecture!r} is not supported{reason}, expected one of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]
