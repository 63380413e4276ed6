"""The benchmark of the converters runs and writes its rows. Nothing here asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import convert

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_command_on_a_model_of_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    convert.main(["--tiny", "--run", "HF to Megatron", "--run", "Megatron to HF", "--out", str(tmp_path)])
    first, *rows = [json.loads(line) for line in (tmp_path / "convert-cpu.jsonl").read_text().splitlines()]
    assert first["environment"]["cores"] > 0
    assert [row["run"] for row in rows] == [convert.COPY, "HF to Megatron", "Megatron to HF"]
    for row in rows:
        assert row["note"] == ""
        assert row["p50"] > 0
        assert row["gb_per_s"] > 0


def test_the_shapes_are_those_of_the_models() -> None:
    from megatron_oisd.convert.families import arguments_from_hf_config, hf_shapes

    sizes = {
        name: sum(_product(shape) for shape in hf_shapes(arguments_from_hf_config(config)).values())
        for name, config in convert.SHAPES.items()
    }
    assert sizes["Qwen3-0.6B"] == 596_049_920
    assert sizes["Llama-3.2-1B"] == 1_235_814_400


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
