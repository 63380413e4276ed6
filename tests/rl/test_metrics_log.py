"""The metrics file: what is written, what a killed or resumed run leaves behind, and TensorBoard's copy."""

from __future__ import annotations

import importlib.util
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.metrics_log import SAMPLES, MetricsLog, RolloutSample, WandbRun, read_metrics


def test_a_step_is_one_json_line(tmp_path: Path) -> None:
    before = time.time()
    with MetricsLog(tmp_path / "run", tensorboard=False) as log:
        log.write(3, {"a": 0.1, "count": 7, "tensor": torch.tensor(0.5), "numpy": np.float32(0.25), "flag": True})
        # Flushed: another process sees the line while the run goes on.
        (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert before - 0.01 <= record.pop("time") <= time.time() + 0.01
    assert record == {"step": 3, "a": 0.1, "count": 7, "tensor": 0.5, "numpy": 0.25, "flag": 1}
    assert list(json.loads(line))[:2] == ["step", "time"]
    assert isinstance(record["count"], int)


def test_numbers_that_are_not_finite_become_null_and_are_listed(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(
            0, {"good": 1.5, "nan": math.nan, "inf": -math.inf, "tensor": torch.tensor(math.nan), "huge": 10**400}
        )

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["non_finite"] == ["nan", "inf", "tensor", "huge"]
    assert [record[name] for name in record["non_finite"]] == [None] * 4
    assert record["good"] == 1.5


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"step": 1}, "'step' is reserved"),
        ({"time": 1}, "'time' is reserved"),
        ({"non_finite": 1}, "'non_finite' is reserved"),
        ({"a": "1.0"}, "'a' is a str"),
        ({"a": None}, "'a' is a NoneType"),
        ({"a": torch.zeros(2)}, "'a' is a Tensor"),
    ],
)
def test_what_is_not_a_number_is_refused_and_writes_nothing(tmp_path: Path, metrics: dict[str, Any], said: str) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        with pytest.raises(OISDError, match=said):
            log.write(0, metrics)
        log.write(1, {"b": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_reading_ignores_a_half_written_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a"')
    assert read_metrics(path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a"\n{"step": 3, "a": 3.0}\n')
    with pytest.raises(OISDError, match="line 2 is not a metrics record"):
        read_metrics(path)
    path.write_text('{"a": 1.0}\n')
    with pytest.raises(OISDError, match="line 1"):
        read_metrics(path)
    path.write_text("")
    assert read_metrics(path) == []
    with pytest.raises(OISDError, match="no metrics can be read"):
        read_metrics(tmp_path / "absent")


def test_resuming_after_a_kill(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.write(step, {"a": float(step), "first": 1.0 if step != 4 else math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a": 6')
    # The checkpoint was made after step 3.
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(4, {"a": 40.0})
        log.write(4, {"held_out": 0.5})
        log.write(5, {"a": 50.0})
    assert '"step": 6' not in (tmp_path / "metrics.jsonl").read_text()
    records = read_metrics(tmp_path)
    assert [(record["step"], record["a"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    assert records[3]["held_out"] == 0.5
    assert records[3]["non_finite"] == ["first"]


def test_a_later_finite_value_clears_the_mark(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"a": math.nan})
        log.write(1, {"a": 2.0})
    (record,) = read_metrics(tmp_path)
    assert record["a"] == 2.0
    assert "non_finite" not in record


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OISDError, match="the metrics log cannot be written"):
        MetricsLog(tmp_path / "file" / "run", tensorboard=False)


def test_a_missing_tensorboard_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    with pytest.warns(UserWarning, match=r"tensorboard is not installed.*megatron_oisd\[rl\]") as caught:
        log = MetricsLog(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write(1, {"a": 1.0})
        log.close()
        log.close()
    assert len(read_metrics(tmp_path)) == 1


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        for step in range(1, 5):
            log.write(step, {"critic/rewards/mean": step / 4, "sometimes": math.nan if step == 2 else 1.0})
    time.sleep(0.01)
    with MetricsLog(tmp_path) as log:  # resumed from step 2
        log.write(3, {"critic/rewards/mean": 30.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {(event.step, event.value) for event in events.Scalars("critic/rewards/mean")} == {
        (1, 0.25),
        (2, 0.5),
        (3, 30.0),
    }
    assert [event.step for event in events.Scalars("sometimes")][:1] == [1]
    assert 2 not in [event.step for event in events.Scalars("sometimes")]


def test_megatron_names_stand_beside_the_others_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        log.write(1, {"actor/lr": 0.5, "actor/grad_norm": 2.0, "timing_s/step": 3.0, "other": 1.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {name: events.Scalars(name)[0].value for name in ("learning-rate", "grad-norm", "iteration-time")}
    assert found == {"learning-rate": 0.5, "grad-norm": 2.0, "iteration-time": 3.0}
    assert "learning-rate" not in (tmp_path / "metrics.jsonl").read_text()


def test_samples_are_readable_text(tmp_path: Path) -> None:
    sample = RolloutSample(prompt="1+1?", response="\\boxed{2} ½", ground_truth="2", reward=1.0, finish_reason="stop")
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write_samples(10, [sample, sample])
    text = (tmp_path / SAMPLES / "step_0000010.txt").read_text(encoding="utf-8")
    assert text.count("[prompt]\n1+1?\n[response]\n\\boxed{2} ½\n") == 2
    assert "--- 2 of 2: reward 1, ended by stop, truth 2" in text


def test_wandb_runs_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb (extra wandb)")
    run = WandbRun("oisd-tests", name="one", mode="offline", config={"lr": 1e-3})
    with MetricsLog(tmp_path, tensorboard=False, wandb=run) as log:
        log.write(1, {"critic/rewards/mean": 0.25, "not finite": math.inf})
        log.write(2, {"critic/rewards/mean": 0.5})
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while not all(text in (content := file.read_bytes()) for text in (b"critic/rewards/mean", b"oisd-tests", b"0.25")):
        assert time.monotonic() < deadline, content  # its service writes a little later
        time.sleep(0.1)
    assert b"not finite" not in content


def test_wandb_that_is_missing_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OISDError, match=r"pip install 'megatron_oisd\[wandb\]'"):
        MetricsLog(tmp_path, tensorboard=False, wandb=WandbRun("p", name="n", mode="offline", config={}))
