"""Live models: HF tensors in and out again, bit by bit, on every rank of TP, PP and virtual-pipeline layouts.

The round trip alone would not see a layout that is wrong in both directions; that Megatron's forward pass means the
same as transformers' is test_roundtrip.py's to show. Transformer Engine's fused names are checked by renaming only: no
CPU build exists.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_oisd.convert.families import arguments_from_hf_config, rules_for
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config
from megatron_oisd.convert.weights import check_tensor_names, load_hf_weights
from megatron_oisd.errors import OISDError
from tests.helpers.checkpoints import build_chunks, differences, export, make_hf_checkpoint
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {
        "tied": make_hf_checkpoint(root / "tied", tied=True),
        "untied": make_hf_checkpoint(root / "untied", tied=False),
        "qwen2": make_hf_checkpoint(root / "qwen2", tied=False, family="Qwen2"),
    }


def _round_trip(directory: Path, tp: int, pp: int, vpp: int | None) -> list[str]:
    """Load, wrap as in training, export in several ways; return what went wrong."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    arguments = arguments_from_hf_config(read_hf_config(directory))
    tensors = dict(SafetensorsDirectory(directory))
    chunks = build_chunks(arguments, tp=tp, pp=pp, vpp=vpp)
    load_hf_weights(chunks, arguments, tensors)
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped: list[nn.Module] = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
    wrong = differences(export(wrapped, arguments), tensors)
    small = export(wrapped, arguments, bucket_bytes=5000)
    wrong += [f"small buckets: {line}" for line in differences(small, tensors)]
    narrow = export(wrapped, arguments, dtype=torch.bfloat16)
    wrong += [f"bf16: {line}" for line in differences(narrow, {n: t.bfloat16() for n, t in tensors.items()})]
    # What was exported may be kept and changed: neither the model nor another tensor may follow.
    for _, tensor in small:
        tensor.fill_(7.0)
    wrong += [f"after writing: {line}" for line in differences(export(wrapped, arguments), tensors)]
    for chunk in chunks:
        wrong += [f"{name}: NaN left" for name, p in chunk.named_parameters() if p.isnan().any()]
    return wrong


@pytest.mark.parametrize(
    ("which", "tp", "pp", "vpp"),
    [
        ("tied", 1, 1, None),
        ("tied", 2, 1, None),
        ("tied", 1, 2, None),
        ("tied", 2, 2, None),
        ("untied", 2, 2, None),
        ("untied", 1, 2, 2),
        ("tied", 1, 4, None),
        ("qwen2", 2, 1, None),
    ],
)
def test_round_trip_is_bit_identical(
    checkpoints: dict[str, Path], which: str, tp: int, pp: int, vpp: int | None
) -> None:
    for rank, wrong in enumerate(run_ranks(tp * pp, _round_trip, checkpoints[which], tp, pp, vpp)):
        assert wrong == [], f"rank {rank}"


def _names_in_order(directory: Path, tp: int, pp: int, vpp: int | None) -> list[str]:
    arguments = arguments_from_hf_config(read_hf_config(directory))
    chunks = build_chunks(arguments, tp=tp, pp=pp, vpp=vpp)
    return [name for name, _ in export(chunks, arguments)]


def test_order_does_not_depend_on_rank_or_layout(checkpoints: dict[str, Path]) -> None:
    orders = run_ranks(1, _names_in_order, checkpoints["untied"], 1, 1, None)
    orders += run_ranks(2, _names_in_order, checkpoints["untied"], 1, 2, 2)
    assert all(order == orders[0] for order in orders)
    assert orders[0][0] == "model.embed_tokens.weight"
    assert orders[0][-1] == "lm_head.weight"


def _errors(directory: Path) -> dict[str, str]:
    arguments = arguments_from_hf_config(read_hf_config(directory))
    tensors = dict(SafetensorsDirectory(directory))
    chunks = build_chunks(arguments, tp=1, pp=1)
    name = "model.layers.2.mlp.up_proj.weight"
    cases = {
        "missing": {k: v for k, v in tensors.items() if k != name},
        "transposed": tensors | {name: tensors[name].t()},
        "short": tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:-1]},
    }
    messages = {}
    for case, changed in cases.items():
        try:
            load_hf_weights(chunks, arguments, changed)
        except OISDError as error:
            messages[case] = str(error)
    chunks[0].extra = nn.Parameter(torch.zeros(1))
    try:
        load_hf_weights(chunks, arguments, tensors)
    except OISDError as error:
        messages["foreign parameter"] = str(error)
    return messages


def test_wrong_tensors_are_named(checkpoints: dict[str, Path]) -> None:
    (messages,) = run_ranks(1, _errors, checkpoints["tied"])
    assert "model.layers.2.mlp.up_proj.weight is missing" in messages["missing"]
    assert "(64, 96), and config.json says (96, 64)" in messages["transposed"]
    assert "(299, 64), and config.json says (300, 64)" in messages["short"]
    assert "parameter extra" in messages["foreign parameter"]
    assert all("\n" not in message for message in messages.values())


def _query_groups(directory: Path) -> str:
    arguments = arguments_from_hf_config(read_hf_config(directory))
    try:
        chunks = build_chunks(arguments, tp=4, pp=1)
        load_hf_weights(chunks, arguments, dict(SafetensorsDirectory(directory)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_tp_that_splits_a_query_group_is_refused(checkpoints: dict[str, Path]) -> None:
    for message in run_ranks(4, _query_groups, checkpoints["tied"]):
        assert message != "loaded"
        assert "2" in message
        assert "4" in message


def test_tensor_names_are_checked(checkpoints: dict[str, Path]) -> None:
    arguments = arguments_from_hf_config(read_hf_config(checkpoints["tied"]))
    names = list(SafetensorsDirectory(checkpoints["tied"]))
    check_tensor_names(arguments, [*names, "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
    with pytest.raises(OISDError, match=r"lacks model\.norm\.weight"):
        check_tensor_names(arguments, [name for name in names if name != "model.norm.weight"])
    with pytest.raises(OISDError, match="adapters"):
        check_tensor_names(arguments, [*names, "model.layers.0.self_attn.q_proj.lora_A.weight"])
    with pytest.raises(OISDError, match=r"config\.json is another model's"):
        check_tensor_names(arguments, [*names, "model.layers.4.mlp.up_proj.weight"])


def test_transformer_engine_names_are_known(checkpoints: dict[str, Path]) -> None:
    arguments = arguments_from_hf_config(read_hf_config(checkpoints["tied"]))
    names = {name: rule.hf[0].name for rule in rules_for(arguments) for name in rule.megatron}
    layer = "decoder.layers.{layer}"
    assert names[f"{layer}.self_attention.linear_qkv.layer_norm_weight"] == names[f"{layer}.input_layernorm.weight"]
    assert names[f"{layer}.mlp.linear_fc1.layer_norm_weight"] == names[f"{layer}.pre_mlp_layernorm.weight"]
