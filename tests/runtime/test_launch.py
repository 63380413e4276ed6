"""The launcher: its ranks' exit code becomes its own, and a request to leave reaches them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_oisd.rl.preemption import REQUEUE_EXIT_CODE
from tests.helpers.training import ROOT


def start(tmp_path: Path, code: str, ranks: int = 2) -> subprocess.Popen[str]:
    script = tmp_path / "rank.py"
    script.write_text("import os, pathlib, signal, sys, time\nRANK = int(os.environ['RANK'])\n" + code)
    command = [sys.executable, "-m", "megatron_oisd.runtime.launch", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(script)], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)


def ends_with(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("if RANK == 1: sys.exit(2)\ntime.sleep(60)", 2),
        ("sys.exit(75)", REQUEUE_EXIT_CODE),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(tmp_path, code, expected):
    returned, said = ends_with(start(tmp_path, code))
    assert returned == expected, said
    assert ("ended first" in said) == bool(expected)


LISTENING = """
asked = []
signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
pathlib.Path(f"ready_{RANK}").touch()
while not asked: time.sleep(0.02)
pathlib.Path(f"asked_{RANK}").touch()
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(("last_words", "expected"), [("", 0), ("sys.exit(75)", 75), ("raise RuntimeError", 75)])
def test_ranks_are_asked_to_leave_and_take_their_time(tmp_path, number, last_words, expected):
    process = start(tmp_path, LISTENING + "time.sleep(1)\n" + last_words)
    wait_for_files(tmp_path, "ready_0", "ready_1")
    process.send_signal(number)
    returned, said = ends_with(process)
    assert returned == expected, said
    assert sorted(path.name for path in tmp_path.glob("asked_*")) == ["asked_0", "asked_1"]


def test_a_rank_that_does_not_listen_yet_is_asked_again(tmp_path):
    early = "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\npathlib.Path(f'early_{RANK}').touch()\ntime.sleep(3)\n"
    process = start(tmp_path, early + LISTENING)
    wait_for_files(tmp_path, "early_0", "early_1")
    process.send_signal(signal.SIGUSR1)
    returned, said = ends_with(process)
    assert returned == 0, said


def test_ranks_that_have_not_begun_are_ended_and_the_job_may_start_again(tmp_path):
    """Without a handler SIGUSR1 ends a rank: nothing is lost, and the exit code says to try again."""
    process = start(tmp_path, "pathlib.Path(f'ready_{RANK}').touch()\ntime.sleep(60)")
    wait_for_files(tmp_path, "ready_0", "ready_1")
    process.send_signal(signal.SIGUSR1)
    returned, said = ends_with(process)
    assert returned == REQUEUE_EXIT_CODE, said


def wait_for_files(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 120
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.05)
