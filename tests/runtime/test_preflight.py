"""The preflight without a cluster: what a node reports, and what is made of all reports."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_oisd.errors import OISDError
from megatron_oisd.runtime import preflight
from megatron_oisd.runtime.model import ModelArguments
from megatron_oisd.runtime.preflight import Expectation, NodeReport, check, partition_problems, probe, read_reports
from tests.helpers.training import load_script, make_workspace, training_arguments

GIB = 2**30
TWO = Expectation(nodes=("a", "b"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("preflight"))


def sound(node: str, **changes: Any) -> NodeReport:
    versions = {"python": "3.11.7", "torch": "2.13.0", "megatron-core": "0.16.1", "transformer-engine": ""}
    return dataclasses.replace(NodeReport(node=node, versions=versions, free_bytes=GIB), **changes)


def raises(error: Exception) -> Any:
    def function() -> None:
        raise error

    return function


def test_nodes_that_share_a_folder_see_each_other(tmp_path):
    found: dict[str, NodeReport] = {}

    def run(node: str) -> None:
        found[node] = probe(node, nodes=["a", "b"], folder=tmp_path / "run" / "slurm", master="localhost", wait_s=60)

    threads = [threading.Thread(target=run, args=(node,)) for node in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for node in "ab":
        report = found[node]
        assert (report.unseen, report.problems) == ([], [])
        assert report.free_bytes is not None
        assert {"python", "torch", "megatron-core", "megatron_oisd", "CUDA"} <= report.versions.keys()
    assert check(list(found.values()), TWO) == []
    text = f"Welcome to the cluster\n{found['a'].line()}\nmodule loaded\n{found['b'].line()}\n"
    assert read_reports(text) == [found["a"], found["b"]]


def test_folders_that_are_not_shared_are_noticed(tmp_path):
    reports = [
        probe(node, nodes=["a", "b"], folder=tmp_path / node, master="localhost", wait_s=0.2) for node in ("a", "b")
    ]
    assert [report.unseen for report in reports] == [["b"], ["a"]]
    lines = check(reports, TWO)
    assert [line.split(" wrote")[0] for line in lines] == ["a: does not see what b", "b: does not see what a"]
    # Of a node that does not report nothing can be seen: said once.
    (line,) = check(reports[:1], TWO)
    assert line.startswith("b: no report")


def test_a_node_reports_all_that_it_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_find_versions", lambda report: {}["absent"])
    (tmp_path / "file").write_text("")
    report = probe(
        "a", nodes=["a"], folder=tmp_path / "file" / "folder", master="no-such-host.invalid", wait_s=0,
        checks=[raises(OISDError("no checkpoint: make one")), raises(ZeroDivisionError("odd"))],
    )  # fmt: skip
    not_writable, environment, checkpoint, odd, address = report.problems
    assert "cannot write to" in not_writable
    assert environment == "KeyError while its environment was looked at: 'absent'"
    assert checkpoint == "no checkpoint: make one"
    assert odd == "ZeroDivisionError: odd"
    assert "cannot resolve no-such-host.invalid" in address
    assert "OISD_HOST_FORMAT" in address


def test_unequal_nodes_are_named_with_what_they_have():
    four = Expectation(nodes=("a", "b", "c", "d"), rollout_nodes=("d",), gpus_per_node=1)
    newer = sound("b").versions | {"torch": "2.14.0", "transformer-engine": "2.1"}
    reports = [
        sound("a", gpus=["H100"]),
        sound("b", gpus=["A100"], versions=newer),
        sound("c", gpus=["H100"]),
        sound("d", gpus=["L40"]),  # a node that only serves may be of another kind
    ]
    assert check(reports, four) == [
        "torch differs: 2.13.0 on a, c, d; 2.14.0 on b: install the same on all nodes",
        "transformer-engine differs: absent on a, c, d; 2.1 on b: install the same on all nodes",
        "GPU model differs: H100 on a, c; A100 on b: ask for one kind (--constraint or --gres gpu:TYPE:N)",
    ]


def test_gpus_and_space_are_counted():
    expected = Expectation(nodes=("a", "b"), ranks_per_node=8, gpus_per_node=4, needed_bytes=3 * GIB // 2)
    full, few = sound("a", gpus=["H100"] * 4, free_bytes=2 * GIB), sound("b", gpus=["H100"] * 3)
    ranks, gpus, space = check([full, few], expected)
    assert ranks == "all 2 nodes: 8 ranks on 4 GPUs: set OISD_RANKS_PER_NODE to the number of GPUs"
    assert gpus.startswith("b: torch sees 3 GPUs, expected 4")
    assert space.startswith("b: 1.0 GiB free for --output, and the run's checkpoints take about 1.5 GiB")


MODEL = ModelArguments(
    num_layers=36, hidden_size=64, ffn_hidden_size=96, num_attention_heads=32, num_query_groups=8, kv_channels=16,
    vocab_size=100, max_position_embeddings=64, rotary_base=1e4, layernorm_epsilon=1e-6, qk_layernorm=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("tp", "pp", "words"),
    [
        (2, 2, []),
        (8, 4, []),
        (3, 1, ["no multiple", "attention heads", "key-value heads"]),
        (16, 1, ["key-value heads"]),
        (1, 8, ["36 layers"]),
        (8, 8, ["no multiple", "36 layers"]),
    ],
)
def test_partition_sizes(tp, pp, words):
    expected = Expectation(nodes=("a", "b", "c", "d", "e"), rollout_nodes=("e",), ranks_per_node=8)
    lines = partition_problems(expected, tensor_parallel=tp, pipeline_parallel=pp, model=MODEL)
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line
    if "no multiple" in words:
        assert "4 nodes x 8 ranks = 32 ranks" in lines[0]


class Tool:
    """``tools/preflight.py`` for one node, in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def run(self, flags: list[str], *, ranks: int = 2) -> tuple[int, str]:
        main = load_script("tools/preflight.py").main
        common = ["--nodes", "a", "--folder", str(self.folder / "slurm"), "--ranks-per-node", str(ranks)]
        assert main(["probe", *common, "--node", "a", "--", *flags]) == 0
        reports = self.folder / "reports"
        reports.write_text(self.capsys.readouterr().out)
        code = main(["check", *common, "--reports", str(reports), "--", *flags])
        return code, self.capsys.readouterr().out


@pytest.fixture
def tool(tmp_path, capsys):
    return Tool(tmp_path, capsys)


def test_a_sound_run_passes(tool, workspace, tmp_path):
    code, said = tool.run(training_arguments(workspace, tmp_path / "run"))
    assert code == 0, said
    assert said.startswith("preflight: 1 nodes, 2 ranks, torch ")


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({"load": "/nowhere"}, 2, ["a: /nowhere has no hf/"]),
        ({"data": "/nowhere.jsonl"}, 2, ["a: --data /nowhere.jsonl cannot be read (No such file or directory)"]),
        ({"pp": 3}, 2, ["no multiple of TP 1 x PP 3 = 3", "--pp 3 does not divide the model's 4 layers"]),
        ({"pp": 1, "mini_batch_prompts": 1}, 4, ["a mini-batch of 4 sequences"]),
        ({"oisd_layers": 4}, 2, ["student layer 4 is outside 1..3"]),
        ({"oisd_layers": 4, "oisd_lambda_think": 0, "oisd_lambda_attn": 0}, 2, []),
        ({"lr": -1}, 2, ["--lr is -1.0: expected a number above 0"]),
    ],
)
def test_what_is_wrong_with_a_run_is_said(tool, workspace, tmp_path, changes, ranks, words):
    code, said = tool.run(training_arguments(workspace, tmp_path / "run", **changes), ranks=ranks)
    assert code == (78 if words else 0), said
    lines = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(lines) == len(words), said
    for line, word in zip(lines, words, strict=True):
        assert word in line


def test_an_output_with_a_run_is_gone_on_with_only_when_asked_for(tool, workspace, tmp_path):
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    for path in (workspace / "mcore").iterdir():
        (output / "checkpoints" / path.name).symlink_to(path)
    flags = training_arguments(workspace, output)
    code, said = tool.run(flags)
    assert code == 78
    assert f"{output} already holds a run at step" in said
    code, said = tool.run([*flags, "--resume"])
    assert code == 0, said
    for path in output.glob("checkpoints/iter_*"):
        path.unlink()
    code, said = tool.run([*flags, "--resume"])
    assert code == 78
    assert "names a checkpoint that is gone" in said


def test_the_space_that_checkpoints_take_is_that_of_weights_and_optimizer(workspace, tmp_path):
    module = load_script("tools/preflight.py")
    parameters = sum(
        path.stat().st_size for path in (workspace / "mcore").glob("iter_*/*")
    ) // 4  # fmt: skip
    for further, bytes_each in (([], 12), (["--bf16"], 14)):
        config, _, _ = module.read_flags([*training_arguments(workspace, tmp_path / "run"), *further])
        assert module.checkpoint_bytes(config) == pytest.approx(3 * parameters * bytes_each, rel=1e-3)


def test_check_needs_the_reports(tool, tmp_path, capsys):
    main = load_script("tools/preflight.py").main
    assert main(["check", "--nodes", "a", "--folder", str(tmp_path)]) == 2
    assert "--reports is missing" in capsys.readouterr().err
    assert main(["check", "--nodes", "a", "--folder", str(tmp_path), "--reports", str(tmp_path / "none")]) == 2
    assert "run the probes first" in capsys.readouterr().err


def test_a_report_is_one_line():
    report = sound("a", problems=["two\nlines"])
    assert "\n" not in report.line()
    assert json.loads(report.line().removeprefix(preflight.PREFIX))["node"] == "a"
