"""The family table: what config.json becomes, and what is refused with a reason."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.convert import families
from megatron_oisd.convert.families import FAMILIES, arguments_from_hf_config, expand, hf_shapes
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config
from megatron_oisd.errors import OISDError
from tests.helpers.checkpoints import logit_error, make_hf_checkpoint
from tests.helpers.ranks import run_ranks

QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960,
    "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = QWEN3_4B | {
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 6144,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
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


def test_llama_config() -> None:
    arguments = arguments_from_hf_config(LLAMA32_1B)
    assert (arguments.use_rope_scaling, arguments.rope_scaling_factor, arguments.rotary_base) == (True, 32.0, 5e5)
    assert not arguments.untie_embeddings_and_output_weights
    assert arguments.window_size is None
    plain = arguments_from_hf_config(LLAMA32_1B | {"rope_scaling": None})
    assert not plain.use_rope_scaling
    # The first Llama 2 checkpoints name neither.
    old = {name: value for name, value in LLAMA32_1B.items() if name not in ("rope_theta", "num_key_value_heads")}
    assert arguments_from_hf_config(old).rotary_base == 1e4
    assert arguments_from_hf_config(old).num_query_groups == 32


def test_mixture_of_experts_config() -> None:
    arguments = arguments_from_hf_config(QWEN3_30B_A3B)
    assert (arguments.num_experts, arguments.moe_router_topk, arguments.moe_ffn_hidden_size) == (128, 8, 768)
    assert arguments.ffn_hidden_size == 6144
    assert not arguments.moe_router_pre_softmax
    assert arguments.moe_layer_freq == 1
    assert arguments.megatron_args()["num_experts"] == 128
    assert len(hf_shapes(arguments)) == 3 + 48 * (8 + 1 + 128 * 3)
    other = QWEN3_30B_A3B | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    arguments = arguments_from_hf_config(other | {"norm_topk_prob": False})
    assert arguments.moe_router_pre_softmax
    assert arguments.moe_layer_freq == (0, 1, 0, 0, 0, 1)
    assert arguments.megatron_args()["moe_layer_freq"] == [0, 1, 0, 0, 0, 1]
    named_anew = {name: value for name, value in QWEN3_30B_A3B.items() if name != "num_experts"}
    assert arguments_from_hf_config(named_anew | {"num_local_experts": 64}).num_experts == 64


WINDOWED = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 4, "max_window_layers": 4}
SOME = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "change", "size", "frequency"),
    [
        (MISTRAL_7B, {}, (4095, 0), None),
        (MISTRAL_7B, {"sliding_window": None}, None, None),
        (QWEN3_4B, {"sliding_window": 4096}, None, None),
        (QWEN3_4B, {"use_sliding_window": True}, None, None),
        (QWEN3_4B, WINDOWED, None, None),
        (QWEN3_4B, WINDOWED | {"max_window_layers": 0}, (8, 0), None),
        (QWEN3_4B, WINDOWED | {"max_window_layers": 3}, (8, 0), (0, 0, 0, 1)),
        (QWEN3_4B, WINDOWED | {"layer_types": SOME}, (8, 0), (0, 1, 0, 1)),
        (QWEN3_30B_A3B, WINDOWED | {"max_window_layers": 0}, (8, 0), None),
    ],
)
def test_windows(config: dict[str, Any], change: dict[str, Any], size: Any, frequency: Any) -> None:
    """What transformers makes of the same keys is asked of transformers."""
    import transformers

    config = config | change
    arguments = arguments_from_hf_config(config)
    assert (arguments.window_size, arguments.window_attn_skip_freq) == (size, frequency)
    theirs = transformers.AutoConfig.for_model(**config)
    kinds = getattr(theirs, "layer_types", None)
    if kinds is None:
        assert theirs.sliding_window == (None if size is None else size[0] + 1)
    else:
        wanted = [0] * len(kinds) if size is None else list(frequency or [1] * len(kinds))
        assert [int(kind == "sliding_attention") for kind in kinds] == wanted


ALL_FAMILIES = ["Qwen3", "Qwen2", "Llama", "Mistral", "Qwen3Moe"]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_config_written_by_transformers_5(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(rope_theta=5e5, num_key_value_heads=8).to_dict()
    arguments = arguments_from_hf_config(config | {"architectures": [f"{family}ForCausalLM"]})
    assert arguments.rotary_base == 5e5
    assert arguments.num_query_groups == 8
    assert arguments.kv_channels == (64 if family == "Qwen3Moe" else 128)
    assert arguments.qk_layernorm == family.startswith("Qwen3")
    assert arguments.add_qkv_bias == (family == "Qwen2")
    assert arguments.untie_embeddings_and_output_weights
    assert arguments.num_experts == (128 if family == "Qwen3Moe" else None)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_absent_keys_are_what_transformers_takes(family: str) -> None:
    import transformers

    theirs = getattr(transformers, f"{family}Config")
    fields = {item.name: item.default for item in dataclasses.fields(theirs)} | {"rope_theta": theirs.default_theta}
    ours = FAMILIES[f"{family}ForCausalLM"]
    assert {name: fields.get(name, "absent") for name in ours.defaults} == ours.defaults
    assert theirs.model_type == ours.model_type


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tensor_list_is_that_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"mlp_only_layers": [1]} if family == "Qwen3Moe" else {}
    directory = make_hf_checkpoint(tmp_path, family=family, tied=tied, num_hidden_layers=2, **changes)
    arguments = arguments_from_hf_config(read_hf_config(directory))
    expected = {name: tuple(tensor.shape) for name, tensor in SafetensorsDirectory(directory).items()}
    assert hf_shapes(arguments) == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies(factor: float) -> None:
    """Megatron's rotary embedding and transformers' at positions beyond the original context, bit for bit."""
    import transformers
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LLAMA32_1B | {"rope_scaling": LLAMA32_1B["rope_scaling"] | {"factor": factor}}
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.for_model(**config))
    arguments = arguments_from_hf_config(config)
    ours = RotaryEmbedding(
        arguments.kv_channels, 1.0, rotary_base=arguments.rotary_base, rope_scaling=arguments.use_rope_scaling,
        rope_scaling_factor=arguments.rope_scaling_factor, use_cpu_initialization=True,
    )  # fmt: skip
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    unscaled = 5e5 ** (-torch.arange(0, 64, 2) / 64)
    changed = ~torch.isclose(ours.inv_freq, unscaled, rtol=1e-4)
    assert 10 < changed.sum() < 20
    positions = torch.tensor([[0, 1, 8191, 8192, 100_000]])
    cos, _ = theirs(torch.zeros(1), positions)
    angles = ours.get_freqs_non_repeated(100_001)[positions[0]]
    assert torch.equal(torch.cat([angles, angles], dim=-1).cos(), cos[0])


@pytest.mark.parametrize("config", [QWEN3_4B, QWEN3_30B_A3B], ids=["dense", "experts"])
def test_every_parameter_once_and_layers_in_order(config: dict[str, Any]) -> None:
    arguments = arguments_from_hf_config(config)
    keys = [(rule.megatron[0], layer) for rule, layer in expand(arguments)]
    assert len(keys) == len(set(keys))
    layers = [layer for _, layer in keys if layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == set(range(config["num_hidden_layers"]))
    experts = [rule.expert for rule, layer in expand(arguments) if layer == 7 and rule.expert is not None]
    assert experts == sorted(list(range(arguments.num_experts or 0)) * 2)
    assert not any("{expert}" in name for rule, _ in expand(arguments) for name in rule.megatron)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "positions are learned", "Qwen3ForCausalLM"]),
        ({"architectures": ["NobodysModel"]}, ["'NobodysModel' is not supported, expected"]),
        ({"architectures": None}, ["architectures is []", "Qwen3ForCausalLM"]),
        ({"architectures": "Qwen3ForCausalLM"}, ["architectures is 'Qwen3ForCausalLM'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_scaling", "'yarn'", "default"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["rope_parameters", "'linear'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"rope_theta": None}, ["rope_theta is None", "positive number"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "unquantised"]),
        ({"attention_bias": True}, ["attention_bias is True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["list of 36 names"]),
        ({"layer_types": ["full_attention"] * 35 + ["chunked_attention"]}, ["chunked_attention", "full_attention is"]),
        ({"layer_types": ["full_attention"] * 35 + ["sliding_attention"]}, ["without a sliding window"]),
        (WINDOWED | {"sliding_window": 0, "max_window_layers": 1}, ["sliding_window is 0"]),
        ({"auto_map": {"AutoModel": "m.M"}}, ["auto_map", "its own model code"]),
        ({"model_type": "llama"}, ["model_type is 'llama'", "'qwen3'"]),
        ({"compression_config": {"format": "int"}}, ["compression_config"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling is 'yarn'", "object"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["list of factors"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, ["change with the length"]),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, ["mrope_section"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps is inf"]),
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


LLAMA3 = LLAMA32_1B["rope_scaling"]


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (LLAMA32_1B, {"attention_bias": True}, ["attention_bias is True", "False"]),
        (LLAMA32_1B, {"mlp_bias": True}, ["mlp_bias is True"]),
        (LLAMA32_1B, {"sliding_window": 512}, ["sliding_window is 512"]),
        (LLAMA32_1B, {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, ["low_freq_factor 2.0", "has 1 built in"]),
        (LLAMA32_1B, {"rope_scaling": LLAMA3 | {"high_freq_factor": 8.0}}, ["high_freq_factor 8.0", "has 4"]),
        (LLAMA32_1B, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}}, ["4096", "8192"]),
        (LLAMA32_1B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor None"]),
        (LLAMA32_1B, {"rope_scaling": LLAMA3 | {"factor": 0}}, ["factor is 0"]),
        (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, ["only sliding_attention is supported"]),
        (MISTRAL_7B, {"sliding_window": "4096"}, ["sliding_window is '4096'"]),
        (MISTRAL_7B, {"use_sliding_window": False}, ["use_sliding_window is False"]),
        (QWEN3_30B_A3B, WINDOWED, ["max_window_layers is 4", "disagree"]),
        (QWEN3_30B_A3B, {"num_local_experts": 64}, ["num_experts is 128 and num_local_experts 64"]),
        (QWEN3_30B_A3B, {"num_experts": None}, ["num_experts is None"]),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, ["num_experts_per_tok is 129", "128 experts"]),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 1}, ["num_experts_per_tok is 1", "without a gradient"]),
        (QWEN3_30B_A3B, {"norm_topk_prob": "yes"}, ["norm_topk_prob is 'yes'"]),
        (QWEN3_30B_A3B, {"mlp_only_layers": 3}, ["mlp_only_layers is 3"]),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, ["decoder_sparse_step is 0"]),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 49}, ["no layer with experts"]),
        (QWEN3_30B_A3B, {"moe_intermediate_size": None}, ["moe_intermediate_size is None"]),
    ],
)  # fmt: skip
def test_refused_by_family(config: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OISDError) as caught:
        arguments_from_hf_config(config | change)
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
        fields = {field.name for field in dataclasses.fields(arguments)}
        assert set(family.fixed) <= fields
    assert not set(families.REFUSED) & set(FAMILIES)


def _example_logits(code: str, directory: Path) -> float:
    """In a process of its own, so that the family is gone afterwards."""
    exec(code, {})
    return logit_error(directory, torch.arange(2 * 24).view(2, 24))


def test_the_example_of_the_page_works(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^ *```python\n( *# runs in tests\n.*?)^ *```$", page, re.DOTALL | re.MULTILINE)
    directory = make_hf_checkpoint(tmp_path, tied=False, family="SeedOss")
    with pytest.raises(OISDError, match="'SeedOssForCausalLM' is not supported"):
        arguments_from_hf_config(read_hf_config(directory))
    (error,) = run_ranks(1, _example_logits, textwrap.dedent(code), directory)
    assert error < 5e-6


def test_the_page_lists_the_families() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.split("## What is supported")[1].split("## What is refused")[0]
    assert set(re.findall(r"^\| `(\w+ForCausalLM)`", table, re.MULTILINE)) == set(FAMILIES)
