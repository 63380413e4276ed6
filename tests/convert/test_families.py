"""The family table: what config.json becomes, and what is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_oisd.convert import families
from megatron_oisd.convert.families import arguments_from_hf_config, expand, hf_shapes
from megatron_oisd.errors import OISDError

QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960,
    "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def test_qwen3_config_of_transformers_4() -> None:
    arguments = arguments_from_hf_config(QWEN3_4B)
    assert (arguments.num_layers, arguments.hidden_size, arguments.ffn_hidden_size) == (36, 2560, 9728)
    assert (arguments.num_attention_heads, arguments.num_query_groups, arguments.kv_channels) == (32, 8, 128)
    assert arguments.rotary_base == 1e6
    assert arguments.layernorm_epsilon == 1e-6
    assert arguments.qk_layernorm
    assert not arguments.add_qkv_bias
    assert not arguments.untie_embeddings_and_output_weights
    assert arguments.vocab_size == 151936 == arguments.padded_vocab_size(1)


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_config_written_by_transformers_5(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(rope_theta=5e5, num_key_value_heads=8).to_dict()
    arguments = arguments_from_hf_config(config | {"architectures": [f"{family}ForCausalLM"]})
    assert arguments.rotary_base == 5e5
    assert arguments.num_query_groups == 8
    assert arguments.kv_channels == 128
    assert arguments.qk_layernorm == (family == "Qwen3")
    assert arguments.add_qkv_bias == (family == "Qwen2")
    assert arguments.untie_embeddings_and_output_weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_tensor_list_is_that_of_transformers(family: str, tied: bool) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    arguments = arguments_from_hf_config(config.to_dict() | {"architectures": [f"{family}ForCausalLM"]})
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert hf_shapes(arguments) == expected


def test_every_parameter_once_and_layers_in_order() -> None:
    arguments = arguments_from_hf_config(QWEN3_4B)
    keys = [(rule.megatron[0], layer) for rule, layer in expand(arguments)]
    assert len(keys) == len(set(keys))
    layers = [layer for _, layer in keys if layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == set(range(36))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "Qwen3ForCausalLM"]),
        ({"architectures": None}, ["architectures is []", "Qwen3ForCausalLM"]),
        ({"architectures": "Qwen3ForCausalLM"}, ["architectures is 'Qwen3ForCausalLM'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling", "'yarn'", "default"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["rope_parameters", "'linear'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_theta": None}, ["rope_theta is None", "positive number"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "unquantised"]),
        ({"attention_bias": True}, ["attention_bias is True"]),
        ({"use_sliding_window": True}, ["use_sliding_window is True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
        ({"attention_dropout": 0.1}, ["attention_dropout is 0.1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "at least 1"]),
        ({"vocab_size": None}, ["vocab_size is None"]),
        ({"hidden_size": "2560"}, ["hidden_size is '2560'"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads is 32", "(5)"]),
        ({"head_dim": None, "hidden_size": 2561}, ["head_dim", "2561"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps is '1e-6'"]),
    ],
)  # fmt: skip
def test_refused_with_one_line(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OISDError) as caught:
        arguments_from_hf_config(QWEN3_4B | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_rules_name_real_fields() -> None:
    arguments = arguments_from_hf_config(QWEN3_4B)
    sizes = families.dimensions(arguments)
    for family in families.FAMILIES.values():
        for rule in family.rules:
            for condition in (rule.when, rule.unless):
                assert condition is None or isinstance(getattr(arguments, condition), bool)
            for source in rule.hf:
                assert set(source.shape) <= set(sizes)
