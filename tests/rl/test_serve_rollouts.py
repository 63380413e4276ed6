"""The server command: what it starts vLLM with, from flags of its own or the trainer's. vLLM itself is not started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.training import load_script


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run."""
    commands: list[list[str]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    (tmp_path / "mcore" / "hf").mkdir(parents=True)
    (tmp_path / "mcore" / "hf" / "config.json").write_text("{}")
    return commands


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_trainers_flags_decide(started: list[list[str]], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("bf16: true\ntemperature: 0.7\noisd_layers: [2]\n")
    serve = load_script("tools/serve_rollouts.py")
    trainer = [
        "--config",
        str(config),
        "--load",
        str(tmp_path / "mcore"),
        "--data",
        "d",
        "--output",
        "o",
        "--seed",
        "5",
    ]
    assert serve.main(["--port", "8123", "--tensor-parallel-size", "2", "--trainer-flags", *trainer]) == 0
    (command,) = started
    assert option(command, "--model") == str(tmp_path / "mcore" / "hf")
    assert option(command, "--dtype") == "bfloat16"
    assert option(command, "--logprobs-mode") == "processed_logprobs"  # of a temperature that is not 1
    assert option(command, "--seed") == "5"
    assert option(command, "--port") == "8123"
    assert option(command, "--tensor-parallel-size") == "2"
    assert option(command, "--host") == "127.0.0.1"


def test_without_a_model_nothing_starts(started: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script("tools/serve_rollouts.py").main(["--port", "1"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert not started
