"""Reads HF's ``config.json`` into Megatron's arguments, and refuses, with the reason, what Megatron cannot express."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_oisd.convert.rules import Family
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

LLAMA3_FIXED = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""What Megatron's ``RotaryEmbedding`` has as constants; only the factor is an argument there."""

_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

_ROPE_REFUSED = {
    "linear": "stretched positions are not proved here",
    "dynamic": "its frequencies change with the length of the sequence, and Megatron's do not",
    "yarn": "Megatron's GPTModel takes its settings from other options, which are not proved here",
    "longrope": "Megatron has no list of factors",
}

_QUANTISED = ("quantization_config", "compression_config", "quantization")


def translate(config: dict[str, Any], architecture: str, family: Family) -> ModelArguments:
    """Translate ``config.json`` of a model of ``family``; see :func:`families.arguments_from_hf_config`."""
    for key in _QUANTISED:
        if config.get(key):
            raise OISDError(
                f"config.json has {key}: quantised weights cannot be trained, use the unquantised checkpoint"
            )
    if config.get("auto_map"):
        raise OISDError(
            f"config.json has auto_map: the checkpoint brings its own model code, which may differ from "
            f"{architecture}; remove the key if it does not"
        )
    if config.get("model_type", family.model_type) != family.model_type:
        raise OISDError(
            f"config.json: model_type is {config['model_type']!r}, expected {family.model_type!r} for {architecture}: "
            f"transformers would build another model"
        )
    for key, allowed in family.required.items():
        if key in config and config[key] not in allowed:
            raise OISDError(
                f"config.json: {key} is {config[key]!r}, and only {_one_of(allowed)} is supported for {architecture}"
            )
    config = {**family.defaults, **config}
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
        layernorm_epsilon=_number(config, "rms_norm_eps"),
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        **_rope(config),
        **_window(config, architecture, family, size),
        **(_experts(config, size) if family.experts else {}),
        **family.fixed,
    )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary arguments from either generation of keys: ``rope_scaling`` beside ``rope_theta``, ``rope_parameters``."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            raise OISDError(f"config.json: {key} is {rope!r}, expected an object with rope_type")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            reason = f" ({_ROPE_REFUSED[kind]})" if isinstance(kind, str) and kind in _ROPE_REFUSED else ""
            raise OISDError(
                f"config.json: {key} has type {kind!r}{reason}, and only 'default' and 'llama3' are supported: use "
                f"the checkpoint without it"
            )
        if rope.get("partial_rotary_factor", 1) not in (1, None):
            raise OISDError(
                f"config.json: {key} has partial_rotary_factor {rope['partial_rotary_factor']}, and only 1 is supported"
            )
        known = _ROPE_KEYS | ({"factor", *LLAMA3_FIXED} if kind == "llama3" else set())
        unknown = sorted(str(name) for name in rope.keys() - known)
        if unknown:
            raise OISDError(
                f"config.json: {key} of type {kind!r} has {', '.join(unknown[:3])}, expected only "
                f"{', '.join(sorted(known))}: what it does is not known here"
            )
        if kind == "llama3":
            found |= _llama3(rope, key)
    rope = config.get("rope_parameters") or {}
    return {**found, "rotary_base": _number(rope if "rope_theta" in rope else config, "rope_theta")}


def _llama3(rope: dict[str, Any], key: str) -> dict[str, Any]:
    for name, value in LLAMA3_FIXED.items():
        if rope.get(name) != value:
            raise OISDError(
                f"config.json: {key} of type 'llama3' has {name} {rope.get(name)!r}, and Megatron's rotary embedding "
                f"has {value} built in: no other value is supported"
            )
    return {"use_rope_scaling": True, "rope_scaling_factor": _number(rope, "factor")}


def _window(config: dict[str, Any], architecture: str, family: Family, size: Callable[..., int]) -> dict[str, Any]:
    """Sliding windows: in HF a query sees ``sliding_window`` keys, itself included, in Megatron ``window_size[0]``
    keys before itself; ``window_attn_skip_freq`` is 1 for a layer with a window and 0 for one without."""
    layers = size("num_hidden_layers")
    wide = config.get("sliding_window") is None or not config.get("use_sliding_window", True)
    plain, windowed = "full_attention", "sliding_attention"
    everywhere = plain if wide or family.window == "none" else windowed
    if family.window == "every_layer" and not wide and config.get("max_window_layers"):
        raise OISDError(
            f"config.json: max_window_layers is {config['max_window_layers']} beside a sliding window, and versions of "
            f"transformers disagree on which layers of {architecture} then have one: remove the key if all layers do"
        )
    kinds = [everywhere] * layers
    if family.window == "by_layer" and not wide:
        first = size("max_window_layers", at_least=0)
        kinds = [windowed if layer >= first else plain for layer in range(layers)]
    given = config.get("layer_types")
    if given is not None:
        if not isinstance(given, list) or len(given) != layers:
            raise OISDError(f"config.json: layer_types is {given!r}, expected a list of {layers} names, one a layer")
        allowed = {plain, windowed} if family.window == "by_layer" and not wide else {everywhere}
        others = sorted({str(kind) for kind in given} - allowed)
        if others:
            raise OISDError(
                f"config.json: layer_types has {', '.join(others)}, and only {' and '.join(sorted(allowed))} is "
                f"supported for {architecture}{' without a sliding window' if wide else ''}"
            )
        kinds = given
    if windowed not in kinds:
        return {}
    frequency = None if plain not in kinds else tuple(int(kind == windowed) for kind in kinds)
    return {"window_size": (size("sliding_window") - 1, 0), "window_attn_skip_freq": frequency}


def _experts(config: dict[str, Any], size: Callable[..., int]) -> dict[str, Any]:
    """Mixture of experts. HF takes the top k of the softmax, Megatron the softmax of the top k: the same where HF
    normalises the k weights, and Megatron's ``moe_router_pre_softmax`` where it does not."""
    layers = size("num_hidden_layers")
    names = [key for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    experts = size(names[-1] if names else "num_experts")
    if len({config[name] for name in names}) > 1:
        raise OISDError(
            f"config.json: num_experts is {config['num_experts']} and num_local_experts {config['num_local_experts']}, "
            f"expected the same number: remove the wrong one"
        )
    active = size("num_experts_per_tok")
    if active > experts:
        raise OISDError(f"config.json: num_experts_per_tok is {active}, expected at most the {experts} experts")
    normalised = config["norm_topk_prob"]
    if not isinstance(normalised, bool):
        raise OISDError(f"config.json: norm_topk_prob is {normalised!r}, expected true or false")
    if active == 1 and normalised:
        raise OISDError(
            "config.json: num_experts_per_tok is 1 with norm_topk_prob, which makes every expert's weight 1 and leaves "
            "the router without a gradient: Megatron refuses it, and so does this converter"
        )
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise OISDError(f"config.json: mlp_only_layers is {dense!r}, expected a list of layer numbers from 0")
    step = size("decoder_sparse_step")
    pattern = tuple(int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers))
    if not any(pattern):
        raise OISDError(
            f"config.json: decoder_sparse_step {step} and mlp_only_layers leave no layer with experts: expected one at "
            f"least"
        )
    return {
        "num_experts": experts,
        "moe_ffn_hidden_size": size("moe_intermediate_size"),
        "moe_router_topk": active,
        "moe_router_pre_softmax": not normalised,
        # A number where all layers are alike: Megatron names layers in checkpoints by their number otherwise.
        "moe_layer_freq": 1 if all(pattern) else pattern,
    }


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(dict.fromkeys(str(value) for value in values))


def _size_reader(config: dict[str, Any]) -> Callable[..., int]:
    def size(key: str, default: int | None = None, at_least: int = 1) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise OISDError(f"config.json: {key} is {value!r}, expected an integer of at least {at_least}")
        return value

    return size


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise OISDError(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)
