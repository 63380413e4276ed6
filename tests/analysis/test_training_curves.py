"""The training figure: which panels and lines it holds, what smoothing does, and the command line around it."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_oisd.analysis.training_curves import PANELS, collect_curves, draw, smooth
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.metrics_log import MetricsLog

pytest.importorskip("matplotlib")
TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot_training.py"
BY_KEY = {panel.key: panel for panel in PANELS}
LAYERS = ("oisd/think/", "oisd/attn/", "oisd/js/", "oisd/attn_js/")
SCALARS = ("critic/rewards/mean", "actor/entropy", "response_length/mean", "actor/grad_norm")


def run(steps: int, layers: tuple[int, ...] = (), names: tuple[str, ...] = SCALARS) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    keys = [*names, *(f"{prefix}layer_{layer}" for prefix in LAYERS for layer in layers)]
    return [{"step": step, "time": 0.0, **{key: generator.random() for key in keys}} for step in range(1, steps + 1)]


def evaluation(**means: float) -> dict[str, Any]:
    rows = {
        label: {"samples_per_prompt": 16, "avg_at_k": mean, "avg_at_k_interval": [mean - 0.05, mean + 0.05]}
        for label, mean in means.items()
    }
    return {"results": rows, "differences": []}


def text_of(files: list[Path]) -> str:
    """Return the SVG: its text is text, so what the figure says can be read there."""
    return files[1].read_text(encoding="utf-8")


def test_figure_holds_every_panel_run_and_layer(tmp_path: Path) -> None:
    runs = {"OISD": run(40, layers=(6, 12)), "GRPO": run(40)}
    files = draw(runs, tmp_path / "new" / "curves.png", evaluation(before=0.4, OISD=0.6))
    assert [file.name for file in files] == ["curves.png", "curves.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    svg = text_of(files)
    for said in [
        *("Training reward", "Held-out accuracy", "Distance to final distribution", "Distance to last layer"),
        *("Policy entropy", "Response length", "Gradient norm", "OISD", "GRPO", "Avg@16 (%), 95% CI", "before"),
        *("JS, unsigned (nats)", "advantage-weighted JS (nats)", "training step", "mean of the last 2 logged steps"),
    ]:
        assert said in svg, said
    assert svg.count("layer 6") >= 4
    assert svg.count("layer 12") >= 4


def test_panels_without_metrics_are_left_out(tmp_path: Path) -> None:
    svg = text_of(draw({"GRPO": run(5)}, tmp_path / "curves"))
    assert "Policy entropy" in svg
    for absent in ("Held-out", "alignment", "Distance", "layer", "logged steps"):
        assert absent not in svg, absent


def test_evaluation_alone_can_be_drawn(tmp_path: Path) -> None:
    svg = text_of(draw({}, tmp_path / "bars.svg", evaluation(before=0.4, after=0.425)))
    assert "Held-out accuracy" in svg
    assert "42.5" in svg
    assert "Training reward" not in svg


def test_the_same_data_give_the_same_files(tmp_path: Path) -> None:
    first, second = (draw({"a": run(8, (3,))}, tmp_path / name / "c.png") for name in ("x", "y"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_the_output_name_is_kept(tmp_path: Path) -> None:
    assert [file.name for file in draw({"a": run(3)}, tmp_path / "v1.5")] == ["v1.5.png", "v1.5.svg"]


@pytest.mark.parametrize("runs", [{}, {"a": []}, {"a": [{"step": 1, "time": 0.0, "other": 1.0}]}])
def test_nothing_to_draw_is_said(tmp_path: Path, runs: dict[str, Any]) -> None:
    with pytest.raises(OISDError, match="nothing to draw"):
        draw(runs, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_an_evaluation_of_another_form_is_refused(tmp_path: Path) -> None:
    for other in ({}, {"results": [1]}, {"results": {"a": {"avg_at_k": 0.5}}}):
        with pytest.raises(OISDError, match=r"not the table\.json"):
            draw({"a": run(3)}, tmp_path / "c.png", other)


def test_curves_are_collected_by_layer_number() -> None:
    records = [
        {"step": 1, "oisd/js/layer_12": 0.3, "oisd/js/layer_6": 0.4, "oisd/js/mean": 0.35, "oisd/attn_js/layer_6": 9}
    ]
    curves = collect_curves({"a": records}, BY_KEY["oisd/js/"])
    assert [(curve.layer, curve.values.tolist()) for curve in curves] == [(6, [0.4]), (12, [0.3])]


def test_values_that_were_not_finite_are_gaps() -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "critic/rewards/mean": 0.5},
        {"step": 2, "critic/rewards/mean": None, "non_finite": ["critic/rewards/mean"]},
        {"step": 5},
        {"step": 9, "critic/rewards/mean": 0.7},
    ]
    (curve,) = collect_curves({"a": records}, BY_KEY["critic/rewards/mean"])
    assert curve.steps.tolist() == [1, 2, 9]
    assert np.isnan(curve.values).tolist() == [False, True, False]
    assert collect_curves({"a": records[1:3]}, BY_KEY["critic/rewards/mean"]) == []


def test_extreme_values_draw(tmp_path: Path) -> None:
    records = [{"step": step, "actor/grad_norm": 10.0**step, "oisd/js/layer_1": 0.0} for step in range(-3, 30)]
    records[5]["actor/grad_norm"] = None  # type: ignore[assignment]
    svg = text_of(draw({"a": records, "one": [{"step": 3, "actor/grad_norm": 0.5}]}, tmp_path / "c"))
    assert "log scale" in svg


def test_smoothing_looks_back_only() -> None:
    values = np.array([1.0, 3.0, math.nan, 5.0, 100.0])
    assert smooth(values, 1)[[0, 1, 3, 4]].tolist() == [1.0, 3.0, 5.0, 100.0]
    assert smooth(values, 2).tolist() == [1.0, 2.0, 3.0, 5.0, 52.5]
    assert smooth(values[:4], 3).tolist() == smooth(values, 3)[:4].tolist() == [1.0, 2.0, 2.0, 4.0]
    assert np.isnan(smooth(np.array([math.nan, 1.0]), 3)).tolist() == [True, False]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_training_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("oisd", "grpo"):
        with MetricsLog(tmp_path / name, tensorboard=False) as log:
            for step in range(1, 4):
                log.write(step, {"critic/rewards/mean": step / 4, "actor/entropy": math.nan if step == 2 else 0.5})
    table = tmp_path / "table.json"
    table.write_text(json.dumps(evaluation(before=0.1, after=0.2)))
    output = tmp_path / "figures" / "curves.png"
    options = ["--run", f"OISD={tmp_path / 'oisd'}", "--run", f"GRPO={tmp_path / 'grpo' / 'metrics.jsonl'}"]
    assert tool.main([*options, "--evaluation", str(table), "--output", str(output)]) == 0
    assert capsys.readouterr().out.split() == [str(output), str(output.with_suffix(".svg"))]
    assert output.exists()

    for wrong, said in [
        (["--run", "OISD"], "expected LABEL=PATH"),
        ([*options, "--run", f"OISD={tmp_path}"], "given before"),
        (["--run", f"a={tmp_path / 'absent'}"], "no metrics can be read"),
        ([*options, "--evaluation", str(tmp_path / "absent.json")], "not a readable table.json"),
    ]:
        assert tool.main([*wrong, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
