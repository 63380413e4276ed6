"""The study's look into a run: it changes nothing, its parts add up, and OISD reaches no layer above its student."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import add_parity_reward, load_script, read_lines, run_training, training_arguments

SMALL = {"num_steps": 2, "pp": 1, "oisd_layers": 2}


def diagnose(arguments: list[str]) -> None:
    """Called on the one rank."""
    add_parity_reward()
    load_script("examples/study/diagnose.py").main(arguments)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_look_changes_nothing_and_its_parts_add_up(workspace: Path, tmp_path: Path):
    ((code, text),) = run_ranks(1, run_training, training_arguments(workspace, tmp_path / "plain", **SMALL))
    assert code == 0, text
    flags = training_arguments(workspace, tmp_path / "looked", **SMALL)
    run_ranks(1, diagnose, ["--out", str(tmp_path / "parts.jsonl"), "--every", "1", "--", *flags])
    assert read_lines(tmp_path / "looked") == read_lines(tmp_path / "plain")
    rows = read(tmp_path / "parts.jsonl")
    for step in (0, 1):
        groups = {row["group"]: row for row in rows if row["step"] == step}
        assert groups.keys() == {"all", "embedding", "head", *(f"layer {n}" for n in range(1, 5))}
        for part in ("grpo", "think", "attn", "oisd"):
            name = f"norm_{part}"
            total = math.sqrt(sum(row[name] ** 2 for group, row in groups.items() if group != "all"))
            assert groups["all"][name] == pytest.approx(total, rel=1e-9)
        assert groups["all"]["norm_grpo"] > 0
        assert groups["layer 2"]["norm_think"] > 0
        assert groups["layer 2"]["norm_attn"] > 0
        assert -1 <= groups["layer 1"]["cos_grpo_oisd"] <= 1
        for above in ("layer 3", "layer 4"):
            assert groups[above]["norm_oisd"] == 0
            assert groups[above]["cos_grpo_oisd"] is None
        assert groups["head"]["norm_attn"] == 0 < groups["head"]["norm_think"]


def test_operations_are_counted_by_phase(workspace: Path, tmp_path: Path):
    counted = {}
    for name, changes in (("oisd", {}), ("grpo", {"oisd_lambda_think": 0, "oisd_lambda_attn": 0})):
        flags = training_arguments(workspace, tmp_path / name, **SMALL, **changes)
        run_ranks(1, diagnose, ["--out", str(tmp_path / f"{name}.jsonl"), "--count", "--", *flags])
        (counted[name],) = read(tmp_path / f"{name}.jsonl")
    oisd, grpo = counted["oisd"], counted["grpo"]
    assert oisd["gen"] == grpo["gen"] > 0
    assert oisd["old_log_prob"] == grpo["old_log_prob"] > 0
    assert oisd["update_actor"] > grpo["update_actor"] > grpo["old_log_prob"]
    assert grpo["step"] == grpo["gen"] + grpo["old_log_prob"] + grpo["update_actor"]


def test_flags_belong_behind_the_dashes(capsys: pytest.CaptureFixture[str]):
    assert load_script("examples/study/diagnose.py").main(["--out", "rows.jsonl"]) == 2
    assert "put them behind --" in capsys.readouterr().err
