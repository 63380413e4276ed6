"""HF to Megatron to HF on disk: same bytes, same logits, nothing left behind where it fails; and the command lines."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_oisd.convert import plan, weights
from megatron_oisd.convert.checkpoint import read_arguments
from megatron_oisd.convert.hf_files import SafetensorsDirectory
from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore
from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf
from megatron_oisd.convert.verify import compare_logits, sample_token_ids
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime import cpu
from tests.helpers.checkpoints import make_hf_checkpoint

TOOLS = Path(__file__).parents[2] / "tools"


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("Qwen3", True, torch.float32),
        ("Qwen3", False, torch.bfloat16),
        ("Qwen2", False, torch.float32),
        ("Llama", True, torch.float32),
    ],
)
def test_round_trip(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=tied, family=family, dtype=dtype, tokenizer=True)
    there = convert_hf_to_mcore(source, tmp_path / "mcore", progress=False)
    back = convert_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", progress=False)
    for report in (there, back):
        assert report.identical == report.hf_tensors
        assert report.agree
        assert report.rounded == 0
        comparison = report.logits
        assert comparison is not None
        assert comparison.max_rel < 5e-6
        assert comparison.same_argmax == comparison.tokens == 128
        assert comparison.largest_logit > 1  # a model of zeros would agree too
    expected, got = dict(SafetensorsDirectory(source)), dict(SafetensorsDirectory(tmp_path / "back"))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype == dtype
        assert torch.equal(tensor, got[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "mcore"]
    assert not cpu.is_installed()


def test_dtype_and_shards(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = make_hf_checkpoint(tmp_path / "hf", tied=False, tokenizer=True)
    report = convert_hf_to_mcore(source, tmp_path / "mcore", dtype=torch.bfloat16, progress=False)
    assert report.agree
    assert report.logits is not None
    assert report.rounded == report.hf_tensors
    convert_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", progress=False, shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "back")) == 290
    original = AutoModelForCausalLM.from_pretrained(source).bfloat16()
    for (name, a), (_, b) in zip(original.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("verify", ["tensors", "logits"])
def test_wrong_conversion_is_noticed_and_discarded(
    verify: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    original = weights.cut

    def swaps_keys_and_values(rule: Any, parts: list[torch.Tensor], *args: Any) -> torch.Tensor:
        return original(rule, [parts[0], parts[2], parts[1]] if len(parts) == 3 else parts, *args)

    monkeypatch.setattr(plan, "cut", swaps_keys_and_values)
    if verify == "logits":  # a layout that is wrong in both directions: only the logits see it
        back = weights.assemble
        monkeypatch.setattr(
            plan, "assemble", lambda *args: (lambda p: [p[0], p[2], p[1]] if len(p) == 3 else p)(back(*args))
        )
    with pytest.raises(OISDError, match="wrong and was discarded"):
        convert_hf_to_mcore(source, tmp_path / "mcore", verify=verify, progress=False)  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert not cpu.is_installed()


def test_compare_logits_sees_a_change_of_one_weight(tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    convert_hf_to_mcore(source, tmp_path / "mcore", verify=False, progress=False)
    ids = sample_token_ids(read_arguments(tmp_path / "mcore"))
    assert compare_logits(source, tmp_path / "mcore", ids).agree
    tensors = dict(SafetensorsDirectory(source))
    tensors["model.layers.3.self_attn.k_norm.weight"][0] += 0.1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert not compare_logits(source, tmp_path / "mcore", ids).agree


def test_output_directory_rules(tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)

    def convert(target: Path, force: bool = False) -> None:
        convert_hf_to_mcore(source, target, verify=False, progress=False, force=force)

    convert(tmp_path / "deep" / "mcore")
    with pytest.raises(OISDError, match="--force"):
        convert(tmp_path / "deep" / "mcore")
    convert(tmp_path / "deep" / "mcore", force=True)
    with pytest.raises(OISDError, match="overlap"):
        convert(source, force=True)
    with pytest.raises(OISDError, match="overlap"):
        convert(source / "mcore")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(OISDError, match="no checkpoint"):
        convert(tmp_path / "home", force=True)
    (tmp_path / "file").touch()
    with pytest.raises(OISDError, match="is a file"):
        convert(tmp_path / "file", force=True)
    assert (tmp_path / "home" / "letter.txt").exists()


def test_missing_tokenizer_is_said(tmp_path: Path) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True)
    with pytest.warns(UserWarning, match="no tokenizer files"):
        convert_hf_to_mcore(source, tmp_path / "mcore", verify=False, progress=False)


def test_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    hf, mcore, back = str(source), str(tmp_path / "mcore"), str(tmp_path / "back")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _tool("convert_hf_to_mcore").main(["--hf", hf, "--output", mcore]) == 0
        assert "max abs difference" in capsys.readouterr().out
        assert _tool("convert_mcore_to_hf").main(["--mcore", mcore, "--output", back, "--iteration", "0"]) == 0
        assert f"wrote {back}" in capsys.readouterr().out
        assert _tool("verify_checkpoint").main(["--hf", back, "--mcore", mcore]) == 0
        out = capsys.readouterr().out
        assert "same argmax at 128/128" in out
        assert f"{back}: all 5 files are as written" in out
        for tool, arguments, words in (
            ("convert_hf_to_mcore", ["--hf", str(tmp_path), "--output", mcore], "config.json cannot be read"),
            ("convert_hf_to_mcore", ["--hf", hf, "--output", mcore], "--force"),
            ("convert_mcore_to_hf", ["--mcore", mcore, "--output", back + "2", "--iteration", "9"], "iter_0000009"),
            ("convert_mcore_to_hf", ["--mcore", hf, "--output", back + "2"], "has no hf/"),
            ("verify_checkpoint", ["--hf", str(tmp_path / "none"), "--mcore", mcore], "no weights"),
            ("verify_checkpoint", [], "give --hf, --mcore or both"),
            ("verify_checkpoint", ["--hf", hf, "--mcore", mcore, "--token-ids", "1,x"], "'1,x'"),
            ("verify_checkpoint", ["--hf", hf, "--mcore", mcore, "--token-ids", "1,300"], "outside 0..299"),
            ("verify_checkpoint", ["--hf", hf, "--mcore", mcore, "--length", "0"], "--length is 0"),
        ):
            assert _tool(tool).main(arguments) == 2
            captured = capsys.readouterr().err.strip().splitlines()[-1]
            assert captured.startswith("error: ")
            assert words in captured


def test_more_than_one_rank_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_hf_checkpoint(tmp_path / "hf", tied=True, tokenizer=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OISDError, match="without torchrun"):
        convert_hf_to_mcore(source, tmp_path / "mcore", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
