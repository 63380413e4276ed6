"""Every stage of the quickstart in small: it shows that they fit together, not that the model learns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_all_stages_leave_what_the_readme_promises(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "examples" / "quickstart" / "run.py"),
        "--output",
        str(out),
        "--smoke",
        "--tied",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    metrics = [json.loads(line) for line in (out / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert list((out / "train").glob("events.out.tfevents.*"))
    assert (out / "train" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert (out / "model-trained" / "model.safetensors").is_file()
    table = (out / "evaluation" / "table.md").read_text()
    assert "before" in table
    assert "after" in table
    assert (out / "training.png").stat().st_size > 10_000
