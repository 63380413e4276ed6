"""Live models: HF tensors in and out again, bit by bit, on every rank of TP, PP, virtual-pipeline and EP layouts.

The round trip alone would not see a layout that is wrong in both directions; that Megatron's forward pass means the
same as transformers' is shown by logits. Every feature that a family is there for has a control: with it left out, or
off by one, the logits are far apart. Transformer Engine's names are checked by renaming only: no CPU build exists.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_oisd.convert.families import arguments_from_hf_config
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config
from megatron_oisd.convert.weights import check_tensor_names, load_hf_weights
from megatron_oisd.errors import OISDError
from tests.helpers.checkpoints import (
    TOKENS,
    build_chunks,
    differences,
    export,
    logit_error,
    make_hf_checkpoint,
    rename_as_transformer_engine,
)
from tests.helpers.ranks import run_ranks

FAMILIES = ["Qwen3", "Qwen2", "Llama", "Mistral", "Qwen3Moe"]
MIXED: dict[str, Any] = {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    made = {}
    for family in FAMILIES:
        for tied in (True, False):
            name = f"{family} {'tied' if tied else 'untied'}"
            made[name] = make_hf_checkpoint(root / name, tied=tied, family=family)
    made["mixed"] = make_hf_checkpoint(root / "mixed", tied=False, family="Qwen3Moe", **MIXED)
    return made | {"tied": made["Qwen3 tied"], "untied": made["Qwen3 untied"]}


def _round_trip(directory: Path, tp: int, pp: int, vpp: int | None, **experts: Any) -> list[str]:
    """Load, wrap as in training, export in several ways; return what went wrong."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    arguments = arguments_from_hf_config(read_hf_config(directory))
    tensors = dict(SafetensorsDirectory(directory))
    chunks = build_chunks(arguments, tp=tp, pp=pp, vpp=vpp, **experts)
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
    ],
)
def test_round_trip_is_bit_identical(
    checkpoints: dict[str, Path], which: str, tp: int, pp: int, vpp: int | None
) -> None:
    for rank, wrong in enumerate(run_ranks(tp * pp, _round_trip, checkpoints[which], tp, pp, vpp)):
        assert wrong == [], f"rank {rank}"


def _round_trips(directories: dict[str, Path], tp: int, pp: int, experts: dict[str, Any]) -> list[str]:
    wrong = []
    for name, directory in directories.items():
        wrong += [f"{name}: {line}" for line in _round_trip(directory, tp, pp, None, **experts)]
    return wrong


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_family_tied_and_untied(checkpoints: dict[str, Path], tp: int, pp: int) -> None:
    """With experts under TP, each expert is split as well: Megatron's default."""
    for rank, wrong in enumerate(run_ranks(tp * pp, _round_trips, checkpoints, tp, pp, {})):
        assert wrong == [], f"rank {rank}"


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "expert_tp"),
    [(1, 1, 2, None), (1, 1, 4, None), (1, 2, 2, None), (2, 1, 2, 1), (2, 1, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)],
)
def test_expert_parallel(checkpoints: dict[str, Path], tp: int, pp: int, ep: int, expert_tp: int | None) -> None:
    """The last layout splits the experts twice, over EP and within each."""
    which = {name: checkpoints[name] for name in ("Qwen3Moe tied", "mixed")}
    world = pp * max(tp, ep * (tp if expert_tp is None else expert_tp))
    experts = {"ep": ep, "expert_tp": expert_tp}
    for rank, wrong in enumerate(run_ranks(world, _round_trips, which, tp, pp, experts)):
        assert wrong == [], f"rank {rank}"


def _names_in_order(directory: Path, tp: int, pp: int, vpp: int | None, ep: int = 1) -> list[str]:
    arguments = arguments_from_hf_config(read_hf_config(directory))
    chunks = build_chunks(arguments, tp=tp, pp=pp, vpp=vpp, ep=ep)
    return [name for name, _ in export(chunks, arguments)]


def test_order_does_not_depend_on_rank_or_layout(checkpoints: dict[str, Path]) -> None:
    orders = run_ranks(1, _names_in_order, checkpoints["untied"], 1, 1, None)
    orders += run_ranks(2, _names_in_order, checkpoints["untied"], 1, 2, 2)
    assert all(order == orders[0] for order in orders)
    assert orders[0][0] == "model.embed_tokens.weight"
    assert orders[0][-1] == "lm_head.weight"
    orders = run_ranks(1, _names_in_order, checkpoints["mixed"], 1, 1, None)
    orders += run_ranks(2, _names_in_order, checkpoints["mixed"], 1, 1, None, 2)
    assert all(order == orders[0] for order in orders)


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
    quantised = tensors | {name: tensors[name].to(torch.float8_e4m3fn)}
    try:
        load_hf_weights(chunks, arguments, quantised)
    except OISDError as error:
        messages["quantised"] = str(error)
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
    assert "stored as float8_e4m3fn" in messages["quantised"]
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


def _renamed(directories: dict[str, Path], ep: int) -> list[str]:
    wrong = []
    for name, directory in directories.items():
        arguments = arguments_from_hf_config(read_hf_config(directory))
        tensors = dict(SafetensorsDirectory(directory))
        chunks = build_chunks(arguments, tp=1, pp=1, ep=ep)
        rename_as_transformer_engine(chunks[0])
        assert not any("local_experts" in p or "input_layernorm" in p for p, _ in chunks[0].named_parameters())
        load_hf_weights(chunks, arguments, tensors)
        wrong += [f"{name}: {line}" for line in differences(export(chunks, arguments), tensors)]
    return wrong


def test_transformer_engine_names_are_known(checkpoints: dict[str, Path]) -> None:
    assert run_ranks(1, _renamed, checkpoints, 1) == [[]]
    assert run_ranks(2, _renamed, {"mixed": checkpoints["mixed"]}, 2) == [[], []]


def _fused(split: Path, fused: Path, ep: int) -> list[str]:
    """Load the fused checkpoint, export, compare with the split one; then with a fused tensor of a wrong shape."""
    arguments = arguments_from_hf_config(read_hf_config(fused))
    tensors = dict(SafetensorsDirectory(fused))
    check_tensor_names(arguments, tensors)
    chunks = build_chunks(arguments, tp=1, pp=1, ep=ep)
    load_hf_weights(chunks, arguments, tensors)
    wrong = differences(export(chunks, arguments), dict(SafetensorsDirectory(split)))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(OISDError, match=r"gate_up_proj has shape \(4, 95, 64\), and config\.json says \(4, 96, 64\)"):
        load_hf_weights(chunks, arguments, tensors | {name: tensors[name][:, 1:]})
    return wrong


def test_fused_experts_are_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    fused = make_hf_checkpoint(tmp_path, tied=False, family="Qwen3Moe", split_experts=False, **MIXED)
    assert any(name.endswith("experts.gate_up_proj") for name in SafetensorsDirectory(fused))
    assert run_ranks(2, _fused, checkpoints["mixed"], fused, 2) == [[], []]
    arguments = arguments_from_hf_config(read_hf_config(fused))
    names = [name for name in SafetensorsDirectory(fused) if name != "model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(OISDError, match=r"lacks model\.layers\.1\.mlp\.experts\.0\.down_proj"):
        check_tensor_names(arguments, names)


def _wrong_ep(directory: Path) -> str:
    arguments = arguments_from_hf_config(read_hf_config(directory))
    chunks = build_chunks(arguments, tp=1, pp=1, ep=2)
    try:
        load_hf_weights(chunks, dataclasses.replace(arguments, num_experts=5), {})
    except OISDError as error:
        return str(error)
    return "loaded"


def test_ep_that_does_not_divide_the_experts_is_refused(checkpoints: dict[str, Path]) -> None:
    for message in run_ranks(2, _wrong_ep, checkpoints["mixed"]):
        assert message == "EP 2 does not divide the model's 5 experts: use an EP that does"


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(TOKENS, (2, length), generator=torch.Generator().manual_seed(1))


def _logit_errors(cases: dict[str, tuple[Any, ...]], layout: dict[str, Any]) -> dict[str, float]:
    return {
        name: logit_error(directory, tokens, change=change, **layout)
        for name, (directory, tokens, change) in cases.items()
    }


ROUNDING = 5e-6
"""Float32 on both sides; a wrong layout, window or frequency is off by 1e-3 and more."""


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=["tp1", "tp2"])
def test_logits_of_every_family(checkpoints: dict[str, Path], layout: dict[str, int]) -> None:
    cases = {name: (directory, _tokens(32), {}) for name, directory in checkpoints.items()}
    for errors in run_ranks(layout.get("tp", 1), _logit_errors, cases, layout):
        assert all(error < ROUNDING for error in errors.values()), errors


@pytest.mark.parametrize("layout", [{"ep": 2}, {"tp": 2, "ep": 2, "expert_tp": 1}], ids=["ep2", "tp2-ep2"])
def test_logits_of_experts_on_several_ranks(checkpoints: dict[str, Path], layout: dict[str, int]) -> None:
    cases = {name: (checkpoints[name], _tokens(32), {}) for name in ("Qwen3Moe tied", "mixed")}
    for errors in run_ranks(2, _logit_errors, cases, layout):
        assert all(error < ROUNDING for error in errors.values()), errors


def test_logits_tell_the_features_apart(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Windows shorter than the sequence, scaled frequencies at far positions, both orders of softmax and top-k: right
    as the configuration says, visibly wrong otherwise."""

    def make(name: str, family: str, **changes: Any) -> Path:
        return make_hf_checkpoint(tmp_path / name, tied=False, family=family, **changes)

    mistral, llama, experts = checkpoints["Mistral tied"], checkpoints["Llama tied"], checkpoints["Qwen3Moe tied"]
    window = {"use_sliding_window": True, "sliding_window": 7}
    some = make("some", "Qwen3", **window, max_window_layers=2)
    listed = make("listed", "Qwen2", **window, layer_types=["full_attention", "sliding_attention"] * 2)
    wide = make("wide", "Mistral", sliding_window=None)
    tokens, many = _tokens(32), _tokens(1024)
    right = {
        "mistral": (mistral, tokens, {}), "mistral without a window": (wide, tokens, {}),
        "last layers": (some, tokens, {}), "listed layers": (listed, tokens, {}),
        "llama3, long": (llama, many, {}), "plain llama": (make("plain", "Llama", rope_parameters=None), many, {}),
        "softmax first": (make("first", "Qwen3Moe", norm_topk_prob=False), tokens, {}),
        "one expert": (make("one", "Qwen3Moe", num_experts_per_tok=1, norm_topk_prob=False), tokens, {}),
    }  # fmt: skip
    wrong = {
        "window one longer": (mistral, tokens, {"window_size": (5, 0)}),
        "window one shorter": (mistral, tokens, {"window_size": (3, 0)}),
        "no window": (mistral, tokens, {"window_size": None}),
        "window everywhere": (some, tokens, {"window_attn_skip_freq": None}),
        "window in the other layers": (listed, tokens, {"window_attn_skip_freq": (1, 0, 1, 0)}),
        "no scaling": (llama, many, {"use_rope_scaling": False}),
        "another factor": (llama, many, {"rope_scaling_factor": 8.0}),
        "softmax first": (experts, tokens, {"moe_router_pre_softmax": True}),
        "more experts": (experts, tokens, {"moe_router_topk": 3}),
    }
    (errors,) = run_ranks(1, _logit_errors, right, {})
    assert all(error < ROUNDING for error in errors.values()), errors
    (errors,) = run_ranks(1, _logit_errors, wrong, {})
    assert all(error > 1e-3 for error in errors.values()), errors
