"""Every command of the documentation is run: here on a tiny model, or by the test that the table names."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training import load_script

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEADS = (
    *("python", "python3", "torchrun", "make", "pip", "sbatch", "squeue", "scancel", "git", "docker", "pytest"),
    *("examples/slurm/submit.sh", "nemo/bin/pip"),
)
FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
NO_TEST = "no test"
"""What follows says why."""

TINY = (
    "--oisd-layers 2 --num-steps 1 --prompts-per-step 4 --mini-batch-prompts 4 --samples-per-prompt 2 "
    "--max-tokens-per-microbatch 512 --max-prompt-tokens 128 --max-response-tokens 8 --reward exact_match --lr 1e-4"
)
HERE: list[tuple[str, str]] = [
    # A command as the page has it, and what is added to make it small; later flags win.
    (r"tools/doctor\.py$", ""),
    (r"convert_hf_to_mcore\.py --hf HF_DIR --output MCORE_DIR$", ""),
    (r"^torchrun --nproc-per-node 2 tools/train_rl\.py --load MCORE_DIR --data train\.parquet", TINY),
    (r"convert_mcore_to_hf\.py --mcore RUN_DIR/checkpoints --output HF_OUT$", ""),
    (r"evaluate\.py --model HF_OUT --data test\.parquet", "--limit 2 --max-new-tokens 4"),
    (r"plot_training\.py --run OISD=RUN_DIR --output training\.png$", ""),
    (r"analyze\.py recommend --checkpoint HF_DIR --data test\.parquet$", "--limit 2"),
    (r"convert_hf_to_mcore\.py --hf Qwen3-4B --output Qwen3-4B-mcore --dry-run$", ""),
    (r"convert_hf_to_mcore\.py --hf Qwen3-4B --output Qwen3-4B-mcore --dtype bfloat16", ""),
    (r"convert_mcore_to_hf\.py --mcore runs/oisd/checkpoints --iteration 300", ""),
    (r"verify_checkpoint\.py --hf Qwen3-4B-OISD --mcore runs/oisd/checkpoints", ""),
    (r"evaluate\.py --model HF_DIR --data aime_2024\.parquet math500\.parquet", "--limit 2 --max-new-tokens 4"),
    (r"benchmarks\.pipeline_sim --help$", ""),
]
ELSEWHERE: list[tuple[str, str]] = [
    (r"^make quickstart$", "tests/examples/test_quickstart_run.py"),
    (r"^make quickstart ARGS=", "tests/examples/test_quickstart_run.py"),
    (r"^make test$", f"{NO_TEST}: this is it"),
    (r"^make install$", f"{NO_TEST}: what make test begins with"),
    (r"pip install", f"{NO_TEST}: installs packages"),
    (r"^make vllm$", f"{NO_TEST}: installs packages"),
    (r"^python --version$", f"{NO_TEST}: Python's own"),
    (r"tests\.layouts --write", "tests/pipeline/test_layouts.py"),
    (r"megatron_oisd\.runtime\.launch", "tests/runtime/test_launch.py"),
    (r"^git clone", f"{NO_TEST}: needs a network"),
    (r"^docker run", f"{NO_TEST}: a container of NVIDIA's"),
    (r"convert_hf_to_mcore\.py --hf Qwen3-4B --output Qwen3-4B-mcore$", "tests/convert/test_roundtrip.py"),
    (r"^torchrun --nproc-per-node 8 tools/train_rl\.py --config", "tests/rl/test_arguments.py::test_a_recipe_trains"),
    (r"train_rl\.py (--tp 4 --sequence-parallel )?--ep 8", "tests/rl/test_experts.py"),
    (r"train_rl\.py \.\.\. --rollout-engine vllm_server", "tests/rl/test_vllm_engine.py"),
    (r"serve_rollouts\.py", "tests/rl/test_serve_rollouts.py"),
    (r"check_versions\.py", f"{NO_TEST}: installs five releases of Megatron-Core"),
    (r"^python tools/analyze\.py \w+ (?!.*HF_DIR)", "tests/analysis/test_analyze.py"),
    (r"examples/study/", "tests/analysis/test_study.py::test_the_runner_goes_on_where_it_was"),
    (r"benchmarks\.losses --device cuda", f"{NO_TEST}: needs a GPU"),
    (r"benchmarks\.losses", "tests/test_benchmarks.py::test_losses_on_cpu"),
    (r"benchmarks\.attention", "tests/test_benchmarks.py::test_attention"),
    (r"benchmarks\.topk_error", "tests/test_benchmarks.py::test_topk_error"),
    (r"benchmarks\.transport", "tests/test_benchmarks.py::test_transport_on_a_tiny_model"),
    (r"benchmarks\.overhead", "tests/test_benchmarks.py::test_overhead_on_a_tiny_model"),
    (r"benchmarks\.step", "tests/test_benchmarks.py::test_a_step_is_split_into_its_phases"),
    (r"benchmarks\.convert", "tests/convert/test_convert_benchmark.py"),
    (r"benchmarks\.pipeline_sim(?! --help)", "tests/test_pipeline_sim.py"),
    (r"train_rl_oisd\.py", "tests/integrations/test_megatron_lm_program.py::test_the_guides_command_is_accepted"),
    (r"^torchrun \.\.\. train_rl\.py ARGUMENTS$", "tests/integrations/test_megatron_lm_program.py"),
    (r"pytest tests/integrations/test_megatron_lm", "tests/integrations/test_megatron_lm.py"),
    (r"pytest tests/integrations/test_nemo_aligner", "tests/integrations/test_nemo_aligner.py"),
    (r"pytest tests/integrations$", "tests/integrations/test_verl.py"),
    (r"train_gpt_reinforce_actor_oisd\.py", "tests/integrations/test_nemo_aligner.py::test_the_entry_script"),
    (r"--custom-megatron-init-path", "tests/integrations/test_slime.py"),
    (r"verl\.trainer\.main_ppo", "tests/integrations/test_verl.py"),
    (r"quickstart/(arithmetic|make_model)\.py", "tests/examples/test_quickstart_task.py"),
    (r"convert_hf_to_mcore\.py --hf runs/slurm", "tests/convert/test_roundtrip.py"),
    (r"^(sbatch|scancel)", "tests/examples/test_slurm.py"),
    (r"submit\.sh chain", "tests/examples/test_slurm.py"),
    (r"submit\.sh sweep", "tests/examples/test_slurm.py::test_a_sweep_is_an_array_with_a_run_for_each_line"),
    (r"^squeue --me$", f"{NO_TEST}: Slurm's own"),
    (r"tests\.helpers\.slurm_cluster", "tests/examples/test_slurm.py"),
]  # fmt: skip


def commands() -> list[tuple[str, str]]:
    """Page and command, continued lines joined, comments and leading assignments taken off."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [block for language, block in FENCE.findall(text) if language in ("", "bash")]
        inline = re.findall(r"`((?:python|torchrun|make|pip) [^`\n]+)`", FENCE.sub("", text))
        for line in "\n".join(blocks + inline).replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+", " ", line.split(" #")[0]).strip()
            for part in line.split(" && "):
                bare = re.sub(r"^(\w+=\S+ )+", "", part)
                if bare.split(" ")[0] in HEADS and "..." not in bare.split(" ")[0]:
                    found.append((page.name, bare))
    return found


COMMANDS = commands()


def test_every_command_is_run_somewhere():
    assert len(COMMANDS) > 80
    patterns = [pattern for pattern, _ in [*HERE, *ELSEWHERE]]
    unknown = [f"{page}: {line}" for page, line in COMMANDS if not any(re.search(p, line) for p in patterns)]
    assert not unknown
    stale = [pattern for pattern in patterns if not any(re.search(pattern, line) for _, line in COMMANDS)]
    assert not stale
    for _, where in ELSEWHERE:
        if not where.startswith(NO_TEST):
            file, _, name = where.partition("::")
            assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), where


TRAINING = "tools/train_rl.py"


def flags_of(command: str) -> tuple[list[str], list[str]]:
    """Programs of this project that read a command's flags (with their command, where they have several), and these."""
    words = shlex.split(command)
    if words[0] == "make":
        words = shlex.split(next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), ""))
        programs = ["examples/quickstart/run.py", TRAINING]
    elif "train.sbatch" in command or "submit.sh" in command:
        words = words[next(n for n, word in enumerate(words) if word == "--" or word.endswith("train.sbatch")) + 1 :]
        programs = [TRAINING]
    else:
        module = next((word for word in words if word.startswith(("benchmarks.", "tests."))), "")
        # Flags of Megatron-LM's script are Megatron-LM's: tests/integrations/test_megatron_lm_program.py.
        scripts = [w for w in words if w.endswith(".py") and (ROOT / w).is_file() and "megatron_lm" not in w]
        program = module or (scripts[0] if scripts else "")
        words = words[words.index(program) + 1 :] if program else []
        programs = [f"{program} {words[0]}" if program == "tools/analyze.py" else program]
    if "--" in words:
        words = words[: words.index("--")]
    return programs, [word.split("=")[0] for word in words if word.startswith("--")]


def help_of(program: str, capsys: pytest.CaptureFixture[str]) -> str:
    name, *command = program.split()
    script = load_script(name) if name.endswith(".py") else importlib.import_module(name)
    with pytest.raises(SystemExit):
        script.main([*command, "--help"])
    return capsys.readouterr().out


def test_flags_of_every_command_exist(capsys: pytest.CaptureFixture[str]):
    """Also those of commands whose tests run them with others."""
    known: dict[str, str] = {}
    checked, unknown = 0, []
    for page, line in COMMANDS:
        programs, flags = flags_of(line)
        for program in programs if flags else []:
            if program not in known:
                known[program] = help_of(program, capsys)
        text = "".join(known[program] for program in programs if flags)
        checked += len(flags)
        unknown += [f"{flag} in {page}: {line}" for flag in flags if not re.search(rf"{flag}\b(?!-)", text)]
    assert not unknown
    assert checked > 100


@pytest.fixture(scope="module")
def folder(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the pages' names mean something small."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("commands")
    for name in ("tools", "examples", "benchmarks", "megatron_oisd"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("HF_DIR", "Qwen3-4B"):
        (folder / name).symlink_to(workspace / "hf")
    problems = [
        {"prompt": record["messages"], "reward_model": {"ground_truth": record["ground_truth"]}}
        for record in map(json.loads, (workspace / "train.jsonl").read_text().splitlines())
    ]
    for name in ("train", "test", "aime_2024", "math500"):
        parquet.write_table(pyarrow.Table.from_pylist(problems), folder / f"{name}.parquet")
    checkpoints = folder / "runs" / "oisd" / "checkpoints"
    checkpoints.parent.mkdir(parents=True)
    shutil.copytree(workspace / "mcore", checkpoints)
    (found,) = checkpoints.glob("iter_*")
    found.rename(checkpoints / "iter_0000300")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("300")
    return folder


def test_commands_on_a_tiny_model(folder: Path):
    """In the order in which the table has them, which is the pages'."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for pattern, small in HERE:
        lines = {line for _, line in COMMANDS if re.search(pattern, line)}
        for line in sorted(lines):
            command = [*shlex.split(line), *shlex.split(small)]
            result = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert result.returncode == 0, f"{line}\n{result.stdout[-1500:]}\n{result.stderr[-3000:]}"
    assert (folder / "HF_OUT" / "model.safetensors").is_file()
    assert (folder / "Qwen3-4B-OISD" / "config.json").is_file()
    assert "oisd" in (folder / "EVAL_DIR" / "table.md").read_text()
    assert (folder / "training.png").is_file()
