"""Streaming: the same checkpoint as from a whole model, little memory, nothing whole-looking after a kill, the plan."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_oisd.convert import report
from megatron_oisd.convert.checkpoint import HF_DIRECTORY, load_model, read_arguments, save_model, whole_iteration
from megatron_oisd.convert.families import arguments_from_hf_config, hf_shapes
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config
from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore, plan_hf_to_mcore
from megatron_oisd.convert.manifest import MANIFEST, HashingStream, check_manifest, sha256
from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf, plan_mcore_to_hf
from megatron_oisd.convert.safe_pickle import read_metadata
from megatron_oisd.convert.safetensors_io import INDEX, ShardedWriter, read_header
from megatron_oisd.convert.torch_dist import KeyStyle
from megatron_oisd.convert.weights import load_hf_weights
from megatron_oisd.errors import OISDError
from tests.helpers.checkpoints import build_chunks, differences, export, make_hf_checkpoint
from tests.helpers.ranks import Ending, endings, run_ranks

FAMILIES = ["Qwen3", "Qwen2", "Llama", "Mistral", "Qwen3Moe"]


def _directory_bytes(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}


def _stored(iteration: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the metadata says of every entry, and every stored tensor whole, read by torch itself."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = read_metadata(iteration).state_dict_metadata
    tensors = {
        key: torch.full(entry.size, -7, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(dict(tensors), checkpoint_id=str(iteration), no_dist=True)
    return metadata, tensors


# ------------------------------------------------------------------------------------------ same as a whole model


def _write_from_whole_model(hf: Path, target: Path) -> None:
    arguments = arguments_from_hf_config(read_hf_config(hf))
    chunks = build_chunks(arguments, tp=1, pp=1)
    load_hf_weights(chunks, arguments, SafetensorsDirectory(hf))
    save_model(chunks, target, 0, arguments, hf_source=hf)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_of_a_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    hf = make_hf_checkpoint(tmp_path / "hf", tied=tied, family=family, tokenizer=True, shard_size="100KB")
    run_ranks(1, _write_from_whole_model, hf, tmp_path / "whole")
    convert_hf_to_mcore(hf, tmp_path / "streamed", verify="none", progress=False)
    (one, these), (other, those) = (_stored(tmp_path / name / "iter_0000000") for name in ("whole", "streamed"))
    assert one == other  # keys, shapes, chunks, dtypes, objects
    assert these.keys() == those.keys()
    for key, tensor in these.items():
        assert torch.equal(tensor, those[key]), key
    for name in ("common.pt", "metadata.json"):
        path = tmp_path / "whole" / "iter_0000000" / name
        if path.is_file():
            streamed = (tmp_path / "streamed" / "iter_0000000" / name).read_bytes()
            assert len(path.read_bytes()) == len(streamed)  # torch's files carry a random id


def _save_at(hf: Path, target: Path, layout: dict[str, Any], layer_by_layer: bool) -> None:
    arguments = arguments_from_hf_config(read_hf_config(hf))
    chunks = build_chunks(arguments, **layout)
    load_hf_weights(chunks, arguments, SafetensorsDirectory(hf))
    style = KeyStyle(layer_by_layer=layer_by_layer)
    save_model(chunks, target, 3, arguments, hf_source=hf, style=style, manifest=True)


@pytest.mark.parametrize(
    ("family", "tied", "layout", "layer_by_layer"),
    [
        ("Qwen3", True, {"tp": 2, "pp": 2}, False),
        ("Qwen2", False, {"tp": 1, "pp": 2, "vpp": 2}, False),
        ("Llama", True, {"tp": 1, "pp": 2}, True),
        ("Qwen3Moe", False, {"tp": 1, "pp": 1, "ep": 2}, False),
    ],
)
def test_any_layout_is_read_back(
    family: str, tied: bool, layout: dict[str, Any], layer_by_layer: bool, tmp_path: Path
) -> None:
    hf = make_hf_checkpoint(tmp_path / "hf", tied=tied, family=family, tokenizer=True)
    ranks = layout["tp"] * layout["pp"] * layout.get("ep", 1)
    run_ranks(ranks, _save_at, hf, tmp_path / "mcore", layout, layer_by_layer)
    found = convert_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", verify="tensors", progress=False)
    assert (found.identical, found.rounded, found.different) == (found.hf_tensors, 0, [])
    iteration = tmp_path / "mcore" / "iter_0000003"
    assert check_manifest(iteration) == len([path for path in iteration.iterdir() if path.name != MANIFEST])
    expected, got = dict(SafetensorsDirectory(hf)), SafetensorsDirectory(tmp_path / "back")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def _as_plain_megatron(chunks: list[Any]) -> None:
    """Undo what the builder mends in the local spec's names of the norms before experts."""
    for layer in chunks[0].decoder.layers:
        names = layer.submodules_config.sharded_state_dict_keys_map
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"


def _save_with_the_local_spec(hf: Path, target: Path, layer_by_layer: bool) -> list[str]:
    """As Megatron-LM does with ``--transformer-impl local``; then load it again; return what was wrong."""
    arguments = arguments_from_hf_config(read_hf_config(hf))
    chunks = build_chunks(arguments, tp=1, pp=1)
    load_hf_weights(chunks, arguments, SafetensorsDirectory(hf))
    _as_plain_megatron(chunks)
    save_model(chunks, target, 3, arguments, hf_source=hf, style=KeyStyle(layer_by_layer=layer_by_layer))
    chunks = build_chunks(arguments, tp=1, pp=1)
    load_model(chunks, target)
    return differences(export(chunks, arguments), dict(SafetensorsDirectory(hf)))


def _keys(directory: Path) -> set[str]:
    (iteration,) = directory.glob("iter_*")
    return {key for key in read_metadata(iteration).state_dict_metadata if key.startswith("decoder.layers.")}


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_experts_of_megatrons_local_spec(mixed: bool, layer_by_layer: bool, tmp_path: Path) -> None:
    """It names the norm before experts in another way than Transformer Engine's: read, and written on demand."""
    changes: dict[str, Any] = {"mlp_only_layers": [1]} if mixed else {}
    hf = make_hf_checkpoint(tmp_path / "hf", tied=False, family="Qwen3Moe", tokenizer=True, **changes)
    assert run_ranks(1, _save_with_the_local_spec, hf, tmp_path / "plain", layer_by_layer) == [[]]
    found = convert_mcore_to_hf(tmp_path / "plain", tmp_path / "back", verify="tensors", progress=False)
    assert (found.identical, found.different) == (found.hf_tensors, [])
    ours = convert_hf_to_mcore(hf, tmp_path / "ours", verify="tensors", progress=False, local_experts=True)
    assert (ours.identical, ours.different) == (ours.hf_tensors, [])
    assert not any("pre_mlp_layernorm" in key for key in _keys(tmp_path / "plain") | _keys(tmp_path / "ours"))
    if not layer_by_layer:
        assert _keys(tmp_path / "ours") == _keys(tmp_path / "plain")
    convert_hf_to_mcore(hf, tmp_path / "fused", verify="none", progress=False)
    assert any("pre_mlp_layernorm" in key for key in _keys(tmp_path / "fused"))


def _load_at(source: Path, hf: Path, layout: dict[str, Any]) -> list[str]:
    arguments = read_arguments(source)
    chunks = build_chunks(arguments, **layout)
    load_model(chunks, source)
    return differences(export(chunks, arguments), dict(SafetensorsDirectory(hf)))


def test_experts_are_loaded_at_another_layout(tmp_path: Path) -> None:
    hf = make_hf_checkpoint(tmp_path / "hf", tied=False, family="Qwen3Moe", tokenizer=True)
    convert_hf_to_mcore(hf, tmp_path / "mcore", verify="tensors", progress=False)
    for wrong in run_ranks(2, _load_at, tmp_path / "mcore", hf, {"tp": 1, "pp": 1, "ep": 2}):
        assert wrong == []


def test_fused_experts_become_single_ones(tmp_path: Path) -> None:
    hf = make_hf_checkpoint(tmp_path / "hf", tied=False, family="Qwen3Moe", tokenizer=True, split_experts=False)
    assert any(name.endswith("experts.gate_up_proj") for name in SafetensorsDirectory(hf))
    there = convert_hf_to_mcore(hf, tmp_path / "mcore", verify="tensors", progress=False)
    convert_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", verify="tensors", progress=False)
    single = SafetensorsDirectory(
        make_hf_checkpoint(tmp_path / "single", tied=False, family="Qwen3Moe", tokenizer=True)
    )
    assert there.identical == len(single)
    back = SafetensorsDirectory(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in single.items())


# ---------------------------------------------------------------------------------------------------- safetensors


def test_files_are_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(3, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(1.5).bfloat16(),
        "empty": torch.empty(0, 4).bfloat16(),
        "last": torch.randn(7, generator=generator).bfloat16(),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    writer = ShardedWriter(tmp_path, shapes, torch.bfloat16, shard_bytes=32)
    writer.write(iter(tensors.items()))
    assert list(writer.files.values()) == [["odd", "scalar", "empty"], ["last"]]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 23, "total_size": 46}
    for file, names in writer.files.items():
        assert sha256(tmp_path / file) == writer.digests[file]
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert set(opened.keys()) == set(names)
            assert opened.metadata() == {"format": "pt"}
            for name in names:
                assert index["weight_map"][name] == file
                assert torch.equal(opened.get_tensor(name), tensors[name])
        assert {name: entry.shape for name, entry in read_header(tmp_path / file).items()} == {
            n: shapes[n] for n in names
        }
    read = SafetensorsDirectory(tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    convert_hf_to_mcore(source, tmp_path / "mcore", verify="none", progress=False)

    def full(self: HashingStream, block: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HashingStream, "_put", full)
    with pytest.raises(OISDError, match="No space left on device"):
        convert_hf_to_mcore(source, tmp_path / "again", verify="none", progress=False)
    with pytest.raises(OISDError, match="No space left on device"):
        convert_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", verify="none", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mcore"]


# --------------------------------------------------------------------------------------------------------- memory


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


def _peaks(hf: Path, tiny: Path, work: Path) -> tuple[int, int]:
    warnings.simplefilter("ignore")
    convert_hf_to_mcore(tiny, work / "tiny mcore", verify="tensors", progress=False)  # imports
    convert_mcore_to_hf(work / "tiny mcore", work / "tiny back", verify="tensors", progress=False)
    peaks = []
    for function, source, target in (
        (convert_hf_to_mcore, hf, work / "mcore"),
        (convert_mcore_to_hf, work / "mcore", work / "back"),
    ):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        function(source, target, verify="tensors", progress=False)
        peaks.append(_resident("VmHWM") - before)
    return peaks[0], peaks[1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_holds_some_tensors_not_the_model(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 1024,
        "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128, "max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }  # fmt: skip
    hf, mib = tmp_path / "hf", 2**20
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(arguments_from_hf_config(config))
    ShardedWriter(hf, shapes, torch.float32, 10**9).write((name, torch.ones(shape)) for name, shape in shapes.items())
    assert (hf / "model.safetensors").stat().st_size > 400 * mib
    largest = 16 * mib  # the embedding, and gate and up together
    tiny = make_hf_checkpoint(tmp_path / "tiny", tied=True)
    ((there, back),) = run_ranks(1, _peaks, hf, tiny, tmp_path)
    # Seen: 44 to 106 MiB. The writer's buffers and what malloc keeps of freed blocks below 32 MiB are in it.
    assert there < 4 * largest + 100 * mib
    assert back < 4 * largest + 100 * mib


# ---------------------------------------------------------------------------------------------------------- kills


def _convert(direction: str, source: Path, out: Path, number: int) -> int:
    """Convert; die by SIGKILL at the ``number``-th step that changes a file, or return how many there were."""
    done = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for owner, name in (
        (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (shutil, "copyfile"), (HashingStream, "write"),
    ):  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))
    if direction == "to HF":
        convert_mcore_to_hf(source, out, verify="none", progress=False, shard_bytes=200_000, force=True)
    else:
        convert_hf_to_mcore(source, out, verify="none", progress=False, force=True)
    return done


@pytest.mark.parametrize("direction", ["to Megatron", "to HF"])
def test_a_killed_conversion_leaves_nothing_whole_and_starts_again(direction: str, tmp_path: Path) -> None:
    hf = make_hf_checkpoint(tmp_path / "in" / "hf", tied=True, tokenizer=True)
    convert_hf_to_mcore(hf, tmp_path / "in" / "mcore", verify="none", progress=False)
    source, out = tmp_path / "in" / ("mcore" if direction == "to HF" else "hf"), tmp_path / "out" / "model"

    def run(number: int) -> Ending:
        (ending,) = endings(1, _convert, direction, source, out, number, limit_s=60)
        assert not ending.error
        return ending

    steps = run(0).value
    assert steps > 30
    whole = set(_directory_bytes(out))
    moments = {1, 2, steps - 2, steps - 1, steps, *random.Random(direction).sample(range(3, steps - 2), 5)}
    for number in sorted(moments):
        shutil.rmtree(out, ignore_errors=True)
        assert run(number).signal == signal.SIGKILL
        if out.exists():  # killed after the rename: then it is whole
            assert set(_directory_bytes(out)) == whole
        else:
            assert all(path.name.startswith(".") for path in out.parent.iterdir())
        assert run(0).value >= steps
        assert [path.name for path in out.parent.iterdir()] == ["model"], number
        assert set(_directory_bytes(out)) == whole
        check_manifest(out if direction == "to HF" else out / "iter_0000000")


# ------------------------------------------------------------------------------------------- manifest, plan, report


def test_the_manifest_sees_what_changed(tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    convert_hf_to_mcore(source, tmp_path / "mcore", verify="none", progress=False)
    convert_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", verify="none", progress=False)
    iteration, back = tmp_path / "mcore" / "iter_0000000", tmp_path / "back"
    for directory in (iteration, back, tmp_path / "mcore" / HF_DIRECTORY):
        assert check_manifest(directory) == len([p for p in directory.iterdir() if p.name != MANIFEST])
    entry = json.loads((back / MANIFEST).read_text())["files"]["model.safetensors"]
    assert entry["tensors"] == len(SafetensorsDirectory(back))

    weights = back / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(OISDError, match="its sha256 is not the one"):
        check_manifest(back)
    SafetensorsDirectory(back)  # loading checks sizes only
    weights.write_bytes(data + b"\0")
    with pytest.raises(OISDError, match=rf"manifest\.json says {len(data)}: .* delete manifest\.json"):
        SafetensorsDirectory(back)
    stored = next(iteration.glob("*.distcp"))
    stored.write_bytes(stored.read_bytes() + b"\0")
    with pytest.raises(OISDError, match=r"manifest\.json says"):
        whole_iteration(tmp_path / "mcore")
    for text in ("{", "[]", '{"files": {"../x": {"size": 1, "sha256": ""}}}', '{"files": {"x": {}}}'):
        (back / MANIFEST).write_text(text)
        with pytest.raises(OISDError, match=r"manifest\.json is damaged"):
            SafetensorsDirectory(back)


def test_the_plan_names_every_tensor_and_writes_nothing(tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=False, family="Qwen3Moe", dtype=torch.bfloat16, tokenizer=True)
    plan = plan_hf_to_mcore(source, tmp_path / "mcore", dtype=torch.float32)
    *lines, totals, peak = plan.lines()
    names = [name for line in lines for name in line.split(" -> ")[0].split(" + ")]
    assert sorted(names) == sorted(SafetensorsDirectory(source))
    assert any("lm_head.weight -> output_layer.weight  vocabulary 384x64 float32 98304 bytes" in line for line in lines)
    assert f"{len(names)} HF tensors" in totals
    assert "peak memory" in peak
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    convert_hf_to_mcore(source, tmp_path / "mcore", dtype=torch.float32, verify="none", progress=False)
    stored = read_metadata(tmp_path / "mcore" / "iter_0000000").state_dict_metadata
    assert {line.split(" -> ")[1].split("  ")[0].split("[")[0] for line in lines} == {
        key for key, entry in stored.items() if hasattr(entry, "chunks")
    }
    with pytest.raises(OISDError, match="--force"):
        plan_hf_to_mcore(source, tmp_path / "mcore")


def test_the_plan_towards_hf_names_its_files(tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    convert_hf_to_mcore(source, tmp_path / "mcore", verify="none", progress=False)
    how: Any = {"dtype": torch.bfloat16, "shard_bytes": 100_000}
    plan, writer = plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mcore"]
    lines = list(plan.lines(writer))
    embedding = "embedding.word_embeddings.weight -> model.embed_tokens.weight"
    assert lines[0] == f"{embedding}  vocabulary 384x64 float32 -> bfloat16 {300 * 64 * 2} bytes"
    convert_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", verify="none", progress=False, **how)
    written = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(written) > 2
    assert [line.split(":")[0] for line in lines if ".safetensors:" in line] == written
    names = [name for line in lines for name in line.split("  ")[0].split(" -> ")[-1].split(" + ") if " -> " in line]
    assert sorted(names) == sorted(SafetensorsDirectory(tmp_path / "back"))
    with pytest.raises(OISDError, match="--force"):
        plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back")


def test_logits_need_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    monkeypatch.setattr(report, "available_memory", lambda: 1000)
    found = convert_hf_to_mcore(source, tmp_path / "mcore", progress=False)
    assert found.logits is None
    assert found.identical == found.hf_tensors
    assert "logits were not compared" in str(found)
    found.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["agree"] is True
    assert written["note"] == found.note


def test_prompts_and_the_report(tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    found = convert_hf_to_mcore(source, tmp_path / "mcore", prompts=["w3 w4 w5", [1, 2]], progress=False)
    assert found.logits is not None
    assert found.logits.tokens == 3  # the tokenizer takes the text for one word
    found.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["logits"]["tokens"] == 3
    assert written["hf"] == str(source)
    for prompts, words in (([[]], "0 tokens"), ([[300]], "outside 0..299"), ([[0] * 129], "129 tokens")):
        with pytest.raises(OISDError, match=words):
            report.verify_pair(source, tmp_path / "mcore", prompts=prompts, progress=False)
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(OISDError, match="give token ids instead"):
        report.verify_pair(source, tmp_path / "mcore", prompts=["w1"], progress=False)
    with pytest.raises(OISDError, match="cannot be written"):
        found.write(tmp_path / "nowhere" / "report.json")


def test_changed_bits_are_counted(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    convert_hf_to_mcore(source, tmp_path / "mcore", verify="none", progress=False)
    tensors = dict(SafetensorsDirectory(source))
    tensors["model.norm.weight"][3] = -0.0 if tensors["model.norm.weight"][3] else 1.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = report.verify_pair(source, tmp_path / "mcore", progress=False)
    assert found.different == ["model.norm.weight"]
    assert found.identical == found.hf_tensors - 1
    assert found.logits is None  # not worth the time
    assert not found.agree
