"""The doctor: what it finds is what is installed, and every absence has its price."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oisd.runtime import doctor
from tests.helpers.training import ROOT

TOOL = ROOT / "tools" / "doctor.py"


def test_the_command_reports_this_machine():
    import torch

    result = subprocess.run(
        [sys.executable, str(TOOL), "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    for name in ("megatron-core", "safetensors", "transformers", "matplotlib"):
        assert findings[name]["state"] == "ok"
        assert findings[name]["found"] == importlib.metadata.version(name)
    assert findings["torch"]["found"].startswith(torch.__version__)
    assert (findings["GPUs"]["state"] == "ok") is torch.cuda.is_available()
    for finding in findings.values():
        assert finding["state"] == "ok" or finding["cost"], finding


def test_absent_and_broken_packages_are_told_apart(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("wandb", "apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "wandb.py").write_text("raise RuntimeError('built for another machine')\n")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers.py").write_text("")  # the other package of that name
    monkeypatch.syspath_prepend(str(tmp_path))
    findings = {finding.name: finding for finding in doctor.report()}
    assert (findings["vllm"].state, findings["vllm"].found) == ("absent", "not installed")
    assert (findings["wandb"].state, findings["wandb"].found) == ("broken", "built for another machine")
    assert (findings["apex"].state, findings["apex"].found) == ("broken", "apex.optimizers has no FusedAdam")
    lines = capsys.readouterr().out.splitlines()
    assert any("pip install 'megatron_oisd[vllm]'" in line for line in lines)


def test_a_missing_requirement_fails_the_command(tmp_path: Path):
    (tmp_path / "safetensors.py").write_text("raise ImportError('no')\n")
    result = subprocess.run(
        [sys.executable, str(TOOL), "--json"], capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert pytest.approx(1) == sum(f["name"] == "safetensors" and f["required"] for f in json.loads(result.stdout))
