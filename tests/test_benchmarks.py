"""The benchmarks' own instruments on known cases, their command lines on tiny sizes. Nothing here asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention, contenders, harness, losses, overhead, step, topk_error, transport, updates
from megatron_oisd.analysis.operations import OperationCounter

ROOT = Path(__file__).resolve().parents[1]
NUMBER = 250_000  # one tensor of a megabyte


def _known(x: torch.Tensor) -> torch.Tensor:
    """Peaks at three tensors of the size of ``x``: a and b and their sum; then one remains while another is made."""
    a, b = x + 1, x + 2
    total = a + b
    del a, b
    view = total.view(2, -1)[1:]
    view.mul_(3)
    return total * 2


def test_cpu_meter_on_a_known_case():
    x = torch.zeros(NUMBER)
    assert harness.peak_bytes(lambda: _known(x), device="cpu") == pytest.approx(3 * 4 * NUMBER, rel=0.01)


def test_storage_meter_on_the_same_case_real_and_fake():
    x = torch.zeros(NUMBER)
    with harness.StorageMeter([x]) as meter:
        x.add_(1)  # writes to what was there
        result = _known(x)
    assert meter.peak == 3 * 4 * NUMBER
    assert meter.live == result.nbytes
    del result
    assert meter.live == 0

    def make():
        fake = torch.zeros(NUMBER)
        return lambda: _known(fake), [fake]

    assert harness.fake_peak(make) == 3 * 4 * NUMBER


def test_backward_is_metered_too():
    x = torch.zeros(NUMBER, requires_grad=True)

    def function():
        x.grad = None
        # exp keeps its result for backward, which makes one more; the sum's gradient is expanded, without storage.
        x.exp().sum().backward()

    for peak in (harness.peak_bytes(function, device="cpu"), _with_meter(function, x)):
        assert peak == pytest.approx(2 * 4 * NUMBER, rel=0.01)


def _with_meter(function, *known):
    with harness.StorageMeter(known) as meter:
        function()
    return meter.peak


@pytest.mark.parametrize("name", ["ours, hidden teacher", "naive fp32"])
def test_both_meters_agree_on_a_loss(name):
    case = contenders.Case(96, 700, 24, torch.float32)
    contender = contenders.make_contender(name)
    inputs = contenders.make_inputs(case)

    def function():
        contenders.run(contender, inputs)
        inputs.student.grad = inputs.head.grad = None

    function()
    peak = harness.peak_bytes(function, device="cpu")
    assert peak == pytest.approx(_with_meter(function, *inputs.tensors()), rel=0.02)


def test_every_round_runs_every_contender_once_in_turn():
    order = []
    steps = {name: lambda between, n=name: (order.append(n), between()) for name in "abc"}
    times = harness.time_interleaved(steps, device="cpu", repeats=3, warmup=1)
    assert "".join(order) == "abcbcacababc"
    assert set(times) == set("abc")
    assert times["a"].total.p20 <= times["a"].total.p50 <= times["a"].total.p80


def test_percentiles():
    assert harness.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0, 0.0]) == harness.Timing(1.0, 2.5, 4.0)


# ---------------------------------------------------------------------------------------------------- the command lines

NAMES = ["ours, hidden teacher", "ours, into main_grad", "ours, logits teacher", "ours, top-256 teacher", "naive fp32"]


def _read(path):
    record, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert record["environment"]["torch"] == torch.__version__
    return rows


def test_losses_on_cpu(tmp_path, capsys):
    chosen = [part for name in NAMES for part in ("--contender", name)]
    losses.main(["--device", "cpu", "--grid", "tiny", "--repeats", "2", "--out", str(tmp_path), *chosen])
    rows = {row["contender"]: row for row in _read(tmp_path / "losses-cpu.jsonl")}
    assert set(rows) == {*NAMES, "4 products", "3 products"}
    for name in NAMES:
        assert "note" not in rows[name]
        assert rows[name]["peak_bytes"] > 0
        assert rows[name]["gflop"] == rows[name]["products"] * 2 * 48 * 500 * 32 / 1e9
        if "top-" not in name:
            assert rows[name]["loss"] == pytest.approx(rows["naive fp32"]["loss"], rel=1e-5)
            assert rows[name]["gradient_error"] < 1e-5
    assert "| ours, hidden teacher | 48 | 500 |" in capsys.readouterr().out


def test_losses_on_fake_tensors(tmp_path):
    chosen = [part for name in NAMES for part in ("--contender", name)]
    losses.main(["--device", "fake", "--grid", "tiny", "--out", str(tmp_path), *chosen])
    rows = _read(tmp_path / "losses-fake.jsonl")
    assert [row["contender"] for row in rows] == [name for name in NAMES if "top-" not in name]
    assert all(row["peak_bytes"] > 0 for row in rows)


def test_a_missing_package_is_a_row_with_a_note(monkeypatch):
    monkeypatch.setitem(contenders._MAKERS, "TRL", lambda: (_ for _ in ()).throw(ImportError("no trl")))
    rows = losses.measure(losses.GRIDS["cpu"]["tiny"][0], ["TRL", "naive fp32"], repeats=1)
    assert rows[0]["note"] == "not installed: no trl"


def test_attention(tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    attention.main(["--size", "tiny", "--length", "40", "--dtype", "fp32", "--repeats", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("attention-*.jsonl")
    rows = _read(path)
    assert [row["what"] for row in rows][:4] == ["layer", "student", "teacher", "student + teacher"]
    assert "student + teacher" in capsys.readouterr().out


def test_topk_error(tmp_path):
    topk_error.main(["--tokens", "2", "--vocabulary", "300", "--k", "8", "--k", "300", "--out", str(tmp_path)])
    for row in _read(tmp_path / "topk-error.jsonl"):
        assert -1e-9 <= row["lost"] <= row["bound"] + 1e-9
        if row["k"] == 300:
            assert row["gradient_error"] < 1e-6


def test_committed_rows_are_whole():
    """Every file of rows begins with its environment, and the page names each file."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    assert files
    for path in files:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert "environment" in lines[0]
        assert len(lines) > 1
        assert path.name in page


def test_a_teacher_is_a_twentieth_of_fp32_distributions_at_most():
    """Counted, not timed: Qwen3-4B's vocabulary and width on TP 8, what one tensor-parallel rank sends."""
    sizes = {"tokens": 2048, "vocabulary": 152064, "hidden": 2560, "heads": 32, "tp": 8}
    broadcast = 4 * sizes["tokens"] * sizes["vocabulary"] // sizes["tp"]
    for payload, at_most in {"hidden": 1 / 20, "topk": 1 / 20, "logits": 0.51}.items():
        assert sum(part.num_bytes for part in transport.message_parts(payload, **sizes)) < at_most * broadcast


def test_transport_on_a_tiny_model(tmp_path, capsys):
    arguments = ["--tiny", "--tokens", "16", "--vocabulary", "8192", "--hidden", "32", "--heads", "8"]
    transport.main([*arguments, "--repeats", "1", "--steps", "1", "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "transport-cpu.jsonl").read_text().splitlines()][1:]
    messages = [row for row in lines if row["part"] == "messages"]
    assert [row["payload"] for row in messages] == ["hidden", "logits", "topk", "broadcast"]
    assert messages[0]["bytes_ratio"] < 1 == messages[-1]["bytes_ratio"]
    waiting = [row for row in lines if row["part"] == "waiting"]
    assert [(row["stage"], row["buffers"]) for row in waiting] == [(0, 4), (1, 3), (2, 2)], "bounded by P - s"
    assert "wait / step" in capsys.readouterr().out


def test_overhead_on_a_tiny_model(tmp_path):
    overhead.main(["--device", "cpu", "--tiny", "--repeats", "1", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "overhead-cpu.jsonl").read_text().splitlines()][1:]
    assert len(rows) == 3 * 5
    assert {row["ratio"] for row in rows if row["update"] == "GRPO"} == {1.0}


def test_operations_of_an_update_are_those_that_pytorch_counts():
    """On one rank, where every matrix product is seen; Megatron's unfused attention computes whole scores."""
    from megatron_oisd.config import OISDConfig
    from megatron_oisd.runtime import cpu

    shape = updates.Shape.tiny()
    was_installed = cpu.is_installed()
    try:
        with updates.Updates(shape) as run:
            with OperationCounter() as counter:
                run.run(oisd=False)
            grpo = counter.total
            run.attach(OISDConfig(layers=(1,), lambda_attn=0.0))
            with OperationCounter() as counter:
                run.run(oisd=True)
            added = counter.total - grpo
    finally:
        if not was_installed:
            cpu.uninstall()
    half = 3 * 2 * shape.layers * shape.length * shape.heads * shape.head_dim * shape.length * shape.microbatches
    assert grpo == pytest.approx(shape.flops() + half, rel=1e-3)
    assert added == pytest.approx(shape.lens_flops(1), rel=1e-6)


def test_a_step_is_split_into_its_phases(workspace, tmp_path):
    (tmp_path / "quickstart" / "data").mkdir(parents=True)
    (tmp_path / "quickstart" / "mcore").symlink_to(workspace / "mcore")
    (tmp_path / "quickstart" / "data" / "train.jsonl").symlink_to(workspace / "train.jsonl")
    flags = ["--variant", "quickstart", "--variant", "token budget", "--steps", "1", "--rounds", "1"]
    step.main(["--quickstart", str(tmp_path / "quickstart"), "--out", str(tmp_path), *flags])
    first, second = [json.loads(line) for line in (tmp_path / "step-cpu.jsonl").read_text().splitlines()][1:]
    assert (first["variant"], first["ratio"], second["variant"]) == ("quickstart", 1.0, "token budget")
    for row in (first, second):
        assert 0 < sum(row[phase] for phase in step.PHASES[:-1]) <= row["step"]
