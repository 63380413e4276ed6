"""The study's statistics against numbers worked out by hand and by scipy, and its runner on runs of no size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oisd.analysis.study import Estimate, compare, reward_differences, write_report
from megatron_oisd.errors import OISDError
from tests.helpers.training import ROOT

stats = pytest.importorskip("scipy.stats", reason="needs scipy (extra study)")
pytest.importorskip("matplotlib")

GRPO = {1: 0.50, 2: 0.54, 3: 0.46}
OISD = {1: 0.53, 2: 0.58, 3: 0.47}


def rows():
    def row(variant, seed, steps, value, step_flops):
        rewards = [0.1 * seed + 0.01 * i for i in range(steps)]
        return {
            "variant": variant, "lr": "3e-4", "seed": seed, "steps": steps, "avg_at_8": value, "pass_at_8": 0.9,
            "reward_last_10": 0.5, "step_flops": step_flops, "rewards": rewards,
        }  # fmt: skip

    found = []
    for seed, value in GRPO.items():
        found += [row("GRPO", seed, steps, value + 0.01 * (steps - 10) / 2, 100) for steps in (10, 12, 14)]
    found += [row("OISD", seed, 10, value, 112) for seed, value in OISD.items()]
    return [*found, row("one seed", 1, 10, 0.6, 212)]


TIMES = [
    {"variant": variant, "round": number, "step_s": step_s}
    for variant, measured in (("GRPO", (2.0, 4.0, 2.0)), ("OISD", (2.5, 5.0, 9.0)), ("one seed", (9.0,)))
    for number, step_s in enumerate(measured)
]


def test_an_estimate_is_students():
    values = [0.03, 0.04, 0.01]
    estimate = Estimate.of(values)
    mean, deviation = sum(values) / 3, math.sqrt(sum((v - 0.08 / 3) ** 2 for v in values) / 2)
    half = 4.302652729911275 * deviation / math.sqrt(3)  # t of 2 degrees of freedom at 97.5%
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((mean, mean - half, mean + half))
    assert estimate.p_value == pytest.approx(stats.ttest_rel(list(OISD.values()), list(GRPO.values())).pvalue)
    alone = Estimate.of([0.5])
    assert alone.mean == 0.5
    assert math.isnan(alone.low)
    assert math.isnan(alone.p_value)
    assert math.isnan(Estimate.of([0.0, 0.0]).p_value)


def test_differences_are_paired_by_seed_and_matched_in_time():
    base, oisd, single = compare(rows(), baseline="GRPO", steps=10, times=TIMES)
    assert (base.variant, base.difference, base.time, base.operations) == ("GRPO", None, None, None)
    assert oisd.difference is not None
    assert oisd.difference.mean == pytest.approx(0.08 / 3)
    assert oisd.time is not None
    assert oisd.time.cost == pytest.approx(1.25)  # of its round; the third was disturbed
    # 12.5 of GRPO's steps take as long: the next evaluated number is 14, where it has 0.02 more.
    assert oisd.time.steps == 14
    assert oisd.time.difference is not None
    assert oisd.time.difference.mean == pytest.approx(0.08 / 3 - 0.02)
    assert oisd.operations is not None
    assert oisd.operations.cost == pytest.approx(1.12)
    assert oisd.operations.steps == 12
    assert oisd.operations.difference is not None
    assert oisd.operations.difference.mean == pytest.approx(0.08 / 3 - 0.01)
    assert single.difference is not None
    assert single.time is not None
    assert (single.difference.count, single.time.steps, single.time.difference) == (1, None, None)  # never as long
    assert all(row.time is None for row in compare(rows(), baseline="GRPO", steps=10))
    with pytest.raises(OISDError, match="no finished run of 'SFT' at 10 steps"):
        compare(rows(), baseline="SFT", steps=10)


def test_rewards_are_compared_over_the_first_steps():
    made = rows()
    for row in made:
        if row["variant"] == "OISD":
            row["rewards"] = [
                value + (0.06 if i < 2 else 0.0) + 0.01 * row["seed"] for i, value in enumerate(row["rewards"])
            ]
    for window, expected in ((2, 0.08), (4, 0.05)):
        found = reward_differences(made, baseline="GRPO", steps=10, window=window)
        assert found.keys() == {"OISD", "one seed"}
        assert found["OISD"].mean == pytest.approx(expected)
        assert found["one seed"].count == 1


def test_the_report_says_what_the_comparison_found(tmp_path: Path):
    slow = [{**row, "lr": "1e-4"} for row in rows() if row["variant"] != "one seed"]
    text = write_report(rows() + slow, tmp_path, baseline="GRPO", steps=10, times=TIMES)
    assert (tmp_path / "study.md").read_text() == text
    assert "| OISD | 3 | 52.7 (" in text
    assert "| one seed | 1 | 60.0 | +10.0 | - | 2.12 | - | - | - | 4.50 | - | - | - |" in text
    assert "| OISD | +0.0 (+0.0 to +0.0) | - | +0.0" in text
    document = json.loads((tmp_path / "study.json").read_text())
    assert [row["variant"] for row in document["3e-4"]] == ["GRPO", "OISD", "one seed"]
    assert [row["variant"] for row in document["1e-4"]] == ["GRPO", "OISD"]
    assert "### Learning rate 1e-4" in text
    assert document["3e-4"][2]["result"]["low"] is None
    for name in ("study-3e-4.png", "study-3e-4.svg", "study-1e-4.png", "study-1e-4.svg"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_the_runner_goes_on_where_it_was(workspace: Path, tmp_path: Path):
    for name, source in (("mcore", "mcore"), ("model", "hf")):
        (tmp_path / name).symlink_to(workspace / source)
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "heldout.jsonl"):
        (tmp_path / "data" / name).symlink_to(workspace / "train.jsonl")
    command = [
        sys.executable, str(ROOT / "examples" / "study" / "run.py"), "--output", str(tmp_path), "--steps", "1",
        "--every", "1", "--longer", "1", "--seeds", "1", "--problems", "4", "--looks", "1", "--lr", "1e-4",
        "--rounds", "1", "--timed-steps", "2",
        "--variant", "GRPO", "--variant", "OISD",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["steps"]) for row in rows if row["variant"] == "OISD"] == [("OISD", 1)]
    assert [row["steps"] for row in rows if row["variant"] == "GRPO"] == [1, 2]
    assert all(row["step_flops"] > 0 and row["lr"] == "1e-4" for row in rows)
    times = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["round"], len(row["steps_s"])) for row in times] == [("GRPO", 0, 2), ("OISD", 0, 2)]
    assert all(row["step_s"] > 0 for row in times)
    assert (tmp_path / "gradients" / "1e-4" / "1.jsonl").stat().st_size > 0
    before = (tmp_path / "rows.jsonl").read_text()
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 0, second.stderr[-2000:]
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert "| OISD | 1 |" in second.stdout
