"""tools/analyze.py: the commands of docs/analysis.md on a small run, wrong use, and the report in a real browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_oisd.analysis.html_report import Section, write_report
from megatron_oisd.analysis.layer_figures import draw_lens_map, draw_training, printable
from megatron_oisd.analysis.layer_study import LensMap
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.metrics_log import MetricsLog
from tests.analysis.test_recommend import study
from tests.helpers.checkpoints import TOKENS, make_hf_checkpoint, make_tokenizer
from tests.helpers.training import load_script

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What the browser asks for by itself at its start, whatever the page; its names are not resolved in the tests.
BROWSERS_OWN = re.compile(r"https?://[\w.-]+\.(google|googleapis|gvt1)\.com/")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def commands() -> list[list[str]]:
    """The command lines of the page, continued lines joined."""
    text = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python ")]


@pytest.fixture(scope="module")
def main() -> Any:
    return load_script("tools/analyze.py").main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page names: model, run with two checkpoints, problems and an evaluation."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore

    folder = tmp_path_factory.mktemp("analysis")
    model = make_hf_checkpoint(folder / "model", tied=False)
    tokenizer = make_tokenizer(TOKENS)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    asked = [[{"role": "user", "content": f"w{i + 2} w9 w5"}] for i in range(4)]
    rows = [{"id": f"p{i}", "messages": messages, "ground_truth": "w1"} for i, messages in enumerate(asked)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    result = {
        "data_source": "d", "ground_truth": "w1", "rewards": [1.0], "correct": [True], "response_lengths": [3],
        "truncated": [False],
    }  # fmt: skip
    for label in ("before", "after"):
        answers = [{"id": row["id"], **result, "responses": [f"w{n + 3} w4 w8"]} for n, row in enumerate(rows)]
        (evaluation / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    summary = {
        "num_problems": 4, "samples_per_prompt": 2, "avg_at_k": 0.5, "avg_at_k_interval": [0.25, 0.75],
        "pass_at_k": {"1": 0.5, "2": 0.7},
    }  # fmt: skip
    (evaluation / "table.json").write_text(json.dumps({"results": {"before": summary, "after": summary}}))
    run = folder / "run"
    checkpoints = run / "checkpoints"
    convert_hf_to_mcore(model, checkpoints, verify="none", progress=False)
    (checkpoints / "iter_0000000").rename(checkpoints / "iter_0000002")
    shutil.copytree(checkpoints / "iter_0000002", checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("4\n")
    (run / "config.yaml").write_text(f"data: {folder / 'heldout.jsonl'}\n")
    with MetricsLog(run, tensorboard=False) as log:
        for step in range(1, 5):
            log.write(step, {"critic/rewards/mean": step / 5, "oisd/js/layer_2": 0.3 / step})
    return folder


@pytest.mark.slow
def test_every_command_of_the_page(
    main: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    seen = set()
    for words in commands():
        assert words[:2] == ["python", "tools/analyze.py"]
        assert main(words[2:]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        seen.add(words[2])
        if words[2] == "recommend":
            assert re.match(r"--oisd-layers [123]\n|no layer is recommended\n", printed)
            assert "samples" in printed
        else:
            assert all(Path(line).stat().st_size > 1000 for line in printed.splitlines())
    assert seen == {"report", "recommend", "layers", "lens", "training", "compare"}
    layers = json.loads((workspace / "figures" / "layers" / "layers.json").read_text())
    assert layers["response_only"]
    assert layers["positions"] == [3] * 4


@pytest.mark.slow
def test_report_stands_alone(main: Any, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "r.html"
    assert main(["report", "--run", str(workspace / "run"), "--output", str(output), "--limit", "2"]) == 0
    text = output.read_text(encoding="ascii")
    assert all(target.startswith("data:") for target in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert not re.search(r"<script|@import|url\(|<iframe|<object", text)
    for said in ("Training dynamics", "Layers over training", "step 2, step 4", "no --table was given", "Logit lens"):
        assert said in text, said
    assert text.count("<figure>") == 3
    if CHROMIUM is None:
        pytest.skip("no Chromium: the report was not opened in a browser")
    messages, requests, dark = browse(output, tmp_path)
    assert messages == []
    assert requests == set()
    without = tmp_path / "without.html"
    without.write_text(re.sub(r"data:image/svg[^\"]*", "data:,", text))
    assert dark > 1.3 * browse(without, tmp_path)[2]  # the figures are really drawn


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_browser_sees_what_is_not_in_the_file(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('wrong')</script><img src='http://127.0.0.1:9/x.png'>")
    messages, requests, _ = browse(page, tmp_path)
    assert any("wrong" in message for message in messages)
    assert "http://127.0.0.1:9/x.png" in requests


def browse(page: Path, folder: Path) -> tuple[list[str], set[str], int]:
    """Open a page in headless Chromium: its console messages, the URLs asked for over a network, its dark pixels."""
    from matplotlib.image import imread

    log, picture = folder / "net.json", folder / "page.png"
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--no-first-run", "--disable-sync", "--disable-extensions",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
            "--window-size=1200,3600", f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert picture.exists(), done.stderr
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = set(re.findall(r'"url":"((?:https?|wss?)://[^"]*)"', log.read_text(encoding="utf-8", errors="replace")))
    asked = {url for url in asked if not BROWSERS_OWN.match(url)}
    pixels = np.asarray(imread(picture))[..., :3]
    picture.unlink()
    return messages, asked, int((pixels.min(axis=-1) < 0.8).sum())


def test_wrong_use_is_one_line(main: Any, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, run, data = (str(workspace / name) for name in ("model", "run", "heldout.jsonl"))
    for arguments, said in [
        (["lens", "--checkpoint", model], "no samples"),
        (["lens", "--prompt", "w1 w2"], "--checkpoint is missing"),
        (["lens", "--checkpoint", str(tmp_path), "--prompt", "w1 w2"], "is no checkpoint"),
        (["lens", "--checkpoint", model, "--token-ids", "1;2"], "expected numbers with commas"),
        (["lens", "--checkpoint", model, "--prompt", "w1 w2", "--device", "cuda:77"], "--device cuda:77"),
        (["layers", "--checkpoint", model, "--responses", data], "--responses needs --data"),
        (["layers", "--checkpoint", model, "--data", data, "--limit", "0"], "--limit 0"),
        (["recommend", "--checkpoint", model, "--layers", "x"], "either --checkpoint or --layers"),
        (["compare", "--table", "x"], "expected SET=TABLE.JSON"),
        (["report", "--run", run, "--compare-run", "x"], "expected LABEL=RUN"),
        (["report", "--run", str(tmp_path)], "no metrics can be read"),
        (["training", "--run", model, "--prompt", "w1 w2"], "holds no Megatron checkpoint"),
        (["training", "--run", run, "--checkpoints", "1", "--prompt", "w1 w2"], "two checkpoints at least"),
    ]:
        assert main([*arguments, *(["--output", str(tmp_path / "o")] if arguments[0] != "recommend" else [])]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1, arguments
        assert said in error[0]


def test_tokens_of_any_kind_are_drawn(tmp_path: Path) -> None:
    tokens = ["<b>&\"'", "$x^", "\n \t", "\x00\ufffd", "a" * 40]
    lens = LensMap(
        sample="<i>", first_position=0, tokens=tokens, next_tokens=tokens, top_tokens=[tokens, tokens[::-1]],
        probabilities=[[0.0, 0.25, 0.5, 0.75, 1.0]] * 2, js=[[0.1] * 5] * 2,
    )  # fmt: skip
    files = draw_lens_map(lens, tmp_path / "lens.png")
    assert [file.name for file in files] == ["lens.png", "lens.svg"]
    assert printable("a" * 40) == "aaaaaaa…"
    page = write_report(
        tmp_path / "r.html", title="<t>", facts=[("a", "<b>")], sections=[Section(title="x", lens=lens)]
    )
    text = page.read_text()
    assert '<b>&"' not in text
    assert "&lt;b&gt;&amp;" in text
    assert "<i>" not in text


def test_models_of_different_depth_are_not_one_run(tmp_path: Path) -> None:
    with pytest.raises(OISDError, match="different numbers of layers"):
        draw_training([study([[0.1, 0.2]]), study([[0.1, 0.2, 0.3]])], tmp_path / "x.png")
