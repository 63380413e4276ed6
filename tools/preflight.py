#!/usr/bin/env python3
"""Check the nodes of a job before it trains; examples/slurm/train.sbatch runs it.

    srun --ntasks-per-node=1 python tools/preflight.py probe --nodes n1,n2 --folder RUN_DIR/slurm -- FLAGS > reports
    python tools/preflight.py check --nodes n1,n2 --folder RUN_DIR/slurm --reports reports -- FLAGS

FLAGS are those of tools/train_rl.py. ``probe`` prints what one node finds; ``check`` reads what all printed, says
everything that is wrong in one message that names the nodes, and ends with 78 (EX_CONFIG) then, else with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.runtime.preflight import Expectation, check, partition_problems, probe, read_reports

if TYPE_CHECKING:
    from megatron_oisd.rl.config import TrainConfig

REFUSED = os.EX_CONFIG


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this tool's arguments and the trainer's flags."""
    own, _, flags = (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :]) if "--" in argv else (argv, "", [])
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("action", choices=("probe", "check"))
    parser.add_argument("--nodes", required=True, type=_names, help="all nodes of the job, comma-separated")
    parser.add_argument("--rollout-nodes", type=_names, default=[], help="those of them that only serve rollouts")
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0, help="0: the job runs on CPUs")
    parser.add_argument("--folder", required=True, type=Path, help="directory in the run's output, for probe files")
    parser.add_argument("--master", default="localhost", help="probe: host at which the ranks will meet")
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME", ""), help="probe: name of this node")
    parser.add_argument("--wait", type=float, default=60.0, help="probe: seconds until a file is seen by all nodes")
    parser.add_argument("--reports", type=Path, help="check: what the probes printed")
    return parser.parse_args(own), flags


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


@command_line
def main(argv: list[str] | None = None) -> int:
    """Probe this node, or check all reports."""
    arguments, flags = parse_arguments(sys.argv[1:] if argv is None else argv)
    if arguments.action == "probe":
        report = probe(
            arguments.node, nodes=arguments.nodes, folder=arguments.folder, master=arguments.master,
            wait_s=arguments.wait, checks=node_checks(flags),
        )  # fmt: skip
        print(report.line(), flush=True)
        return 0
    if arguments.reports is None:
        raise OISDError("--reports is missing: expected the file that holds what the probes printed")
    try:
        reports = read_reports(arguments.reports.read_text(encoding="utf-8"))
    except OSError as error:
        raise OISDError(f"--reports {arguments.reports} cannot be read ({error}): run the probes first") from None
    config, layers, problems = read_flags(flags)
    expected = Expectation(
        nodes=arguments.nodes, rollout_nodes=arguments.rollout_nodes, ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=arguments.gpus_per_node, needed_bytes=checkpoint_bytes(config) if config else 0,
    )  # fmt: skip
    if config is not None:
        problems += run_problems(config, layers, expected)
    lines = check(reports, expected, problems)
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        print("\n".join([f"preflight: {count}, nothing was started", *(f"  - {line}" for line in lines)]))
        return REFUSED
    versions = reports[0].versions
    print(
        f"preflight: {len(expected.nodes)} nodes, {expected.world_size} ranks, "
        + ", ".join(f"{name} {versions[name]}" for name in ("torch", "megatron-core", "megatron_oisd"))
        + ": nothing is wrong"
    )
    return 0


def read_flags(flags: list[str]) -> tuple[TrainConfig | None, Any, list[str]]:
    """The trainer's configuration and that of OISD, or the problem with the flags."""
    from megatron_oisd.rl.arguments import parse_arguments as parse_flags

    try:
        return (*parse_flags(flags), [])
    except OISDError as error:
        return None, None, [str(error)]


# ---------------------------------------------------------------------------------------------------- on each node


def node_checks(flags: list[str]) -> list[Callable[[], object]]:
    """What every node must be able to read."""
    try:
        config, _, _ = read_flags(flags)
    except ImportError:  # torch is missing here, which the report says
        return []
    if config is None:  # said once, by check
        return []
    return [lambda: can_load(config), lambda: can_resume(config), lambda: can_read(config), lambda: has_vllm(config)]


def can_load(config: TrainConfig) -> None:
    """Raise unless the checkpoint of --load is whole and its model is known."""
    from megatron_oisd.convert.checkpoint import read_arguments, whole_iteration

    read_arguments(config.load)
    for path in sorted(whole_iteration(config.load).iterdir()):
        if not os.access(path, os.R_OK):
            raise OISDError(f"{path} cannot be read: give the job's user permission")


def can_resume(config: TrainConfig) -> None:
    """Raise where the output holds a run that may not be gone on with, or cannot be."""
    from megatron_oisd.convert.checkpoint import latest_iteration, whole_iteration
    from megatron_oisd.convert.output import LATEST
    from megatron_oisd.rl.trainer import CHECKPOINTS

    checkpoints = Path(config.output) / CHECKPOINTS
    if not (checkpoints / LATEST).is_file():
        return
    if not config.resume:
        raise OISDError(
            f"{config.output} already holds a run at step {latest_iteration(checkpoints)}: go on with --resume or "
            "choose another --output"
        )
    failure: OISDError | None = None
    for name in sorted((path.name for path in checkpoints.glob("iter_*")), reverse=True):
        try:
            whole_iteration(checkpoints, int(name.removeprefix("iter_")))
            return
        except (OISDError, ValueError) as error:
            failure = failure or OISDError(str(error))
    raise failure or OISDError(f"{checkpoints} names a checkpoint that is gone: choose another --output")


def can_read(config: TrainConfig) -> None:
    """Raise unless the prompts are there."""
    try:
        with open(config.data, "rb") as file:
            file.read(1)
    except OSError as error:
        raise OISDError(f"--data {config.data} cannot be read ({error.strerror}): check path and mounts") from None


def has_vllm(config: TrainConfig) -> None:
    """Raise where vLLM is wanted and not installed."""
    import importlib.util

    if config.rollout_engine.startswith("vllm") and importlib.util.find_spec("vllm") is None:
        from megatron_oisd.rl.rollout.vllm_engine import INSTALL

        raise OISDError(f"--rollout-engine {config.rollout_engine}, and vLLM is not installed: {INSTALL}")


# ---------------------------------------------------------------------------------------------------- of the run


def run_problems(config: TrainConfig, oisd_config: Any, expected: Expectation) -> list[str]:
    """What does not fit between the flags, the model and the job's size."""
    from megatron_oisd.convert.checkpoint import read_arguments

    model = None
    with contextlib.suppress(OISDError):  # said in the nodes' reports
        model = read_arguments(config.load)
    problems = partition_problems(expected, tensor_parallel=config.tp, pipeline_parallel=config.pp, model=model)
    data_parallel, rest = divmod(expected.world_size, config.tp * config.pp)
    checks: list[Callable[[], object]] = []
    if data_parallel and not rest:
        checks.append(lambda: config.check_data_parallel(data_parallel))
    if model is not None and oisd_config.enabled:
        checks.append(lambda: oisd_config.validate_layers(model.num_layers))
    for check_one in checks:
        try:
            check_one()
        except OISDError as error:
            problems.append(str(error))
    return problems


def checkpoint_bytes(config: TrainConfig) -> int:
    """About what the run's checkpoints will take beyond those that are there."""
    from megatron_oisd.convert.checkpoint import stored_dtype, whole_iteration
    from megatron_oisd.rl.trainer import CHECKPOINTS

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    there = sorted((Path(config.output) / CHECKPOINTS).glob("iter_*"))
    more = max(1, config.keep_checkpoints + 1 - len(there))  # the oldest goes when the newest is whole
    try:
        if there:
            return more * size(there[-1])
        source = whole_iteration(config.load)
        parameters = size(source) / stored_dtype(config.load).itemsize
        # Weights, two moments, and with bf16 weights an fp32 copy of them.
        return int(more * parameters * (2 + 12 if config.bf16 else 4 + 8))
    except (OISDError, OSError):
        return 0  # the nodes' reports say what is wrong


if __name__ == "__main__":
    sys.exit(main())
