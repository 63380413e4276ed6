"""The training command end to end on gloo ranks: it trains, resumes exactly, reads real data, and refuses bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.training import DATA, ROOT, read_lines, run_training, training_arguments


def test_a_resumed_run_follows_the_uninterrupted_one(workspace, tmp_path):
    for code, text in run_ranks(2, run_training, training_arguments(workspace, tmp_path / "whole", num_steps=4)):
        assert code == 0, text
    for steps, resume in ((2, {}), (4, {"resume": True})):
        for code, text in run_ranks(
            2, run_training, training_arguments(workspace, tmp_path / "parts", num_steps=steps, **resume)
        ):
            assert code == 0, text
    whole, parts = read_lines(tmp_path / "whole"), read_lines(tmp_path / "parts")
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert parts == whole
    assert all(line["rollout/log_prob_diff_max"] < 1e-4 for line in whole)
    assert whole[0]["actor/grad_norm"] > 0
    assert {"oisd/think/layer_2", "oisd/attn/layer_2", "actor/entropy", "response_length/mean"} <= whole[0].keys()
    assert sorted(p.name for p in (tmp_path / "whole" / "checkpoints").glob("iter_*")) == [
        "iter_0000002",
        "iter_0000004",
    ]
    assert list((tmp_path / "whole").glob("events.out.tfevents.*"))


def test_tensor_parallel_and_plain_grpo_take_the_same_first_step(workspace, tmp_path):
    """The first step's rollouts do not depend on the layout (the world is as large), so its gradients must agree."""
    visible = {"num_steps": 1, "oisd_lambda_think": 100}  # a random model's layers are alike: OISD pulls little
    layouts = {
        "pp": {"pp": 2},
        "tp": {"pp": 1, "tp": 2, "sequence_parallel": True},
        "dp": {"pp": 1, "micro_batch_size": 1},
    }
    norms = {}
    for name, layout in layouts.items():
        for code, text in run_ranks(
            2, run_training, training_arguments(workspace, tmp_path / name, **visible, **layout)
        ):
            assert code == 0, text
        norms[name] = read_lines(tmp_path / name)[0]["actor/grad_norm"]
    assert norms == pytest.approx(dict.fromkeys(layouts, norms["pp"]), rel=1e-4)
    off = {"oisd_lambda_think": 0, "oisd_lambda_attn": 0}
    for code, text in run_ranks(2, run_training, training_arguments(workspace, tmp_path / "grpo", num_steps=1, **off)):
        assert code == 0, text
    plain = read_lines(tmp_path / "grpo")[0]
    assert not [name for name in plain if name.startswith("oisd/")]
    assert plain["actor/grad_norm"] != pytest.approx(norms["pp"], rel=2e-4)


def test_five_steps_on_the_papers_training_set(workspace, tmp_path):
    if not (DATA / "deepmath-5k.parquet").is_file():
        pytest.skip("the DeepMath-5k parquet file is not here: set OISD_DATA to its folder")
    arguments = training_arguments(
        workspace, tmp_path / "deepmath", num_steps=5, data=DATA / "deepmath-5k.parquet", max_prompt_tokens=1024,
        limit_prompts=200, reward="math_verify",
    )  # fmt: skip
    for code, text in run_ranks(2, run_training, arguments):
        assert code == 0, text
    lines = read_lines(tmp_path / "deepmath")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["response_length/mean"] > 0
        assert "oisd/think/layer_2" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load": "nowhere"}, ["nowhere", "convert_hf_to_mcore"]),
        ({"oisd_layers": 4}, ["student layer 4", "1..3"]),
        ({"oisd_layers": 0}, ["layers holds 0", "counted from 1"]),
        ({"tp": 2}, ["2 ranks", "TP 2 x PP 2"]),
        ({"no_such_flag": 1}, ["--no-such-flag", "--help"]),
        ({"lr": 1e30}, ["--lr", "nan"]),
        ({"reward": "votes"}, ["votes", "exact_match"]),
        ({"micro_batch_size": 3}, ["8 sequences", "microbatches of 3"]),
        ({"data": "missing.parquet"}, ["missing.parquet"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_on_every_rank(workspace, tmp_path, changes, words):
    start = time.monotonic()
    for code, text in run_ranks(
        2, run_training, training_arguments(workspace, tmp_path / "out", num_steps=2, **changes), timeout_s=60
    ):
        assert code == 2
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        for word in words:
            assert word in line.lower() or word in line
    assert time.monotonic() - start < 30


def test_damaged_checkpoints_are_refused(workspace, tmp_path):
    for damage, word in (("truncate", "damaged"), ("tokenizer", "tokenizer")):
        load = tmp_path / damage
        shutil.copytree(workspace / "mcore", load)
        if damage == "truncate":
            victim = max(load.rglob("*.distcp"), key=lambda path: path.stat().st_size)
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        else:
            config = json.loads((load / "hf" / "config.json").read_text())
            (load / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
        for code, text in run_ranks(
            2, run_training, training_arguments(workspace, tmp_path / "out", num_steps=1, load=load)
        ):
            assert code == 2
            assert word in text
            assert str(load) in text


def test_torchrun_ends_all_ranks_within_seconds_of_an_error(workspace, tmp_path):
    """Through the real launcher: one line that says why, exit code not 0, nothing left running."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0", str(ROOT / "tools" / "train_rl.py"),
        *training_arguments(workspace, tmp_path / "out", num_steps=1, tp=3),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        "error: the world has 2 ranks, which TP 3 x PP 2 = 6 does not divide: start a multiple of 6 ranks "
        "(torchrun --nproc-per-node) or change --tp / --pp"
    ]
