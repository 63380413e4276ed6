"""Checks of a job's nodes before it starts: what each node finds (:func:`probe`), and what is wrong (:func:`check`).

``probe`` runs on every node and needs nothing but the standard library to make a report, so that a node without a
working environment can still say so. ``check`` sees the reports of all nodes. Every problem becomes one line that
names its nodes; nothing stops at the first.

Nothing here starts torch.distributed: whether ranks reach each other over the network is not checked, only that every
node can resolve the address at which they will meet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_oisd.runtime.model import ModelArguments

PREFIX = "preflight-report "
"""Begins a report's line, among whatever else a node's login scripts print."""

DISTRIBUTIONS = ("torch", "megatron-core", "transformer-engine", "transformers", "numpy")
"""Packages whose versions must be the same on all nodes; absent everywhere is the same, too."""


@dataclass(kw_only=True)
class NodeReport:
    """What one node found."""

    node: str
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python, packages, CUDA, NCCL and the driver; "" where absent. Equal on all nodes of a sound job."""
    gpus: list[str] = field(default_factory=list)
    """Names of the GPUs that torch sees."""
    free_bytes: int | None = None
    """On the file system of the run's output."""
    unseen: list[str] = field(default_factory=list)
    """Nodes whose file in the shared folder this node did not see in time."""
    problems: list[str] = field(default_factory=list)
    """Further findings, each a line with its cure."""

    def line(self) -> str:
        """The report as one line of text."""
        return PREFIX + json.dumps(dataclasses.asdict(self))


def read_reports(text: str) -> list[NodeReport]:
    """The reports in what the nodes printed; other lines are passed over."""
    lines = (line[len(PREFIX) :] for line in text.splitlines() if line.startswith(PREFIX))
    return [NodeReport(**json.loads(line)) for line in lines]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the job needs."""

    nodes: Sequence[str]
    """All nodes of the job."""
    rollout_nodes: Sequence[str] = ()
    """Those of them that serve rollouts and hold no ranks."""
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    """0: the job runs on CPUs."""
    needed_bytes: int = 0
    """Free space that the run will take."""

    @property
    def training_nodes(self) -> list[str]:
        """The nodes that hold ranks."""
        return [node for node in self.nodes if node not in self.rollout_nodes]

    @property
    def world_size(self) -> int:
        """Ranks of the training run."""
        return len(self.training_nodes) * self.ranks_per_node


# ---------------------------------------------------------------------------------------------------- on each node


def probe(
    node: str,
    *,
    nodes: Sequence[str],
    folder: Path,
    master: str,
    wait_s: float,
    checks: Iterable[Callable[[], object]] = (),
) -> NodeReport:
    """Look at this node.

    Args:
        node: its name.
        nodes: all nodes of the job, which probe at the same time.
        folder: directory in the run's output, which all nodes should see.
        master: host at which the ranks will meet.
        wait_s: seconds in which the others' files must become visible here.
        checks: functions whose exceptions are problems of this node, for example a checkpoint that cannot be read.
    """
    report = NodeReport(node=node)
    _write_token(folder, report)  # early: the others wait for it
    for find in (_find_versions, _find_gpus):
        try:
            find(report)
        except Exception as error:  # a broken installation raises anything
            report.problems.append(f"{type(error).__name__} while its environment was looked at: {error}")
    for check_one in checks:
        try:
            check_one()
        except Exception as error:
            report.problems.append(_words(error))
    try:
        socket.getaddrinfo(master, None)
    except OSError as error:
        report.problems.append(
            f"cannot resolve {master}, where the ranks meet ({error}): set OISD_HOST_FORMAT to the name by which nodes "
            "reach each other"
        )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    report.free_bytes = shutil.disk_usage(existing).free
    report.unseen = _wait_for_tokens(folder, nodes, wait_s)
    return report


def _words(error: Exception) -> str:
    from megatron_oisd.errors import OISDError

    return str(error) if isinstance(error, OISDError) else f"{type(error).__name__}: {error}"


def _token(folder: Path, node: str) -> Path:
    return folder / f"seen_by_{node}"


def _write_token(folder: Path, report: NodeReport) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _token(folder, report.node).write_text(report.node)
    except OSError as error:
        report.problems.append(f"cannot write to {folder} ({error}): choose an --output that every node can write to")


def _wait_for_tokens(folder: Path, nodes: Sequence[str], wait_s: float) -> list[str]:
    """The nodes whose token is not here after ``wait_s`` seconds; network file systems show files late."""
    deadline = time.monotonic() + wait_s
    while True:
        unseen = [node for node in nodes if not _token(folder, node).is_file()]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.1)


def _find_versions(report: NodeReport) -> None:
    report.versions["python"] = platform.python_version()
    for name in DISTRIBUTIONS:
        try:
            report.versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            report.versions[name] = ""
    import megatron_oisd

    # A checkout's version number stays the same while its code changes.
    report.versions["megatron_oisd"] = f"{megatron_oisd.__version__}, source {_source_digest(megatron_oisd.__path__)}"


def _source_digest(roots: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for root in roots:
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def _find_gpus(report: NodeReport) -> None:
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:
        report.problems.append(f"torch cannot be imported ({type(error).__name__}: {error}): repair the environment")
        return
    report.versions["CUDA"] = torch.version.cuda or ""
    if not torch.cuda.is_available():
        return
    report.versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        report.versions["driver"] = driver.read_text().split("Kernel Module", 1)[-1].split("\n")[0].strip()
    for index in range(torch.cuda.device_count()):
        report.gpus.append(torch.cuda.get_device_name(index))
        try:
            torch.zeros(1, device=f"cuda:{index}").add_(1).item()
        except Exception as error:
            report.problems.append(
                f"GPU {index} does not compute ({type(error).__name__}: {str(error).splitlines()[0]}): leave the node "
                "out with --exclude"
            )


# ---------------------------------------------------------------------------------------------------- over all nodes


def partition_problems(
    expected: Expectation, *, tensor_parallel: int, pipeline_parallel: int, model: ModelArguments | None
) -> list[str]:
    """Why the job's ranks cannot be split as asked for.

    Args:
        expected: the nodes.
        tensor_parallel: TP size.
        pipeline_parallel: PP size.
        model: its shape, None where it is not known.
    """
    lines = []
    ranks = f"{len(expected.training_nodes)} nodes x {expected.ranks_per_node} ranks = {expected.world_size} ranks"
    size = tensor_parallel * pipeline_parallel
    if expected.world_size % size:
        lines.append(
            f"{ranks} are no multiple of TP {tensor_parallel} x PP {pipeline_parallel} = {size}: change --nodes, "
            "OISD_RANKS_PER_NODE, --tp or --pp"
        )
    if model is not None:
        for what, number, flag, parts in (
            ("layers", model.num_layers, "--pp", pipeline_parallel),
            ("attention heads", model.num_attention_heads, "--tp", tensor_parallel),
            ("key-value heads", model.num_query_groups, "--tp", tensor_parallel),
        ):
            if number % parts:
                lines.append(f"{flag} {parts} does not divide the model's {number} {what}: choose a divisor")
    return lines


def check(reports: Sequence[NodeReport], expected: Expectation, problems: Iterable[str] = ()) -> list[str]:
    """Everything that is wrong, one line each.

    Args:
        reports: of the nodes; those that are missing are a problem.
        expected: what the job needs.
        problems: found elsewhere, for example in the flags: they come first.
    """
    by_node = {report.node: report for report in reports}
    lines = list(problems)
    missing = [node for node in expected.nodes if node not in by_node]
    if missing:
        lines.append(
            f"{_names(missing, expected)}: no report, so the environment does not start there: see probe.err beside "
            "the logs, and set OISD_VENV, OISD_CONTAINER or OISD_SETUP"
        )
    there = [by_node[node] for node in expected.nodes if node in by_node]
    lines += _grouped(((report.node, text) for report in there for text in report.problems), expected)
    lines += _differences(there, expected)
    lines += _grouped(_of_gpus(there, expected), expected)
    lines += _grouped(_of_space(there, expected), expected)
    lines += _grouped(_of_sharing(there, missing), expected)
    return lines


def _of_gpus(reports: Sequence[NodeReport], expected: Expectation) -> Iterable[tuple[str, str]]:
    for report in reports:
        if expected.gpus_per_node and len(report.gpus) < expected.gpus_per_node:
            yield (
                report.node,
                f"torch sees {len(report.gpus)} GPUs, expected {expected.gpus_per_node}: ask for GPUs that are there "
                "(--gres), install torch for CUDA, or leave the node out with --exclude",
            )
        if 0 < expected.gpus_per_node < expected.ranks_per_node and report.node not in expected.rollout_nodes:
            yield (
                report.node,
                f"{expected.ranks_per_node} ranks on {expected.gpus_per_node} GPUs: set OISD_RANKS_PER_NODE to the "
                "number of GPUs",
            )


def _of_space(reports: Sequence[NodeReport], expected: Expectation) -> Iterable[tuple[str, str]]:
    for report in reports:
        if report.free_bytes is not None and report.free_bytes < expected.needed_bytes:
            yield (
                report.node,
                f"{report.free_bytes / 2**30:.1f} GiB free for --output, and the run's checkpoints take about "
                f"{expected.needed_bytes / 2**30:.1f} GiB: free some, lower --keep-checkpoints or choose another "
                "--output",
            )


def _of_sharing(reports: Sequence[NodeReport], missing: Sequence[str]) -> Iterable[tuple[str, str]]:
    for report in reports:
        unseen = [node for node in report.unseen if node not in missing and node != report.node]
        if unseen:
            yield (
                report.node,
                f"does not see what {', '.join(unseen)} wrote to --output: it must be on a file system that all nodes "
                "share",
            )


def _differences(reports: Sequence[NodeReport], expected: Expectation) -> list[str]:
    """Versions that are not the same everywhere, and GPU models that differ between the nodes that train."""
    lines = []
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        found = {report.node: report.versions.get(name, "") or "absent" for report in reports}
        lines += _unequal(name, found, expected, "install the same on all nodes")
    training = [report for report in reports if report.node not in expected.rollout_nodes]
    models = {report.node: " + ".join(sorted(set(report.gpus))) or "none" for report in training}
    lines += _unequal("GPU model", models, expected, "ask for one kind (--constraint or --gres gpu:TYPE:N)")
    return lines


def _unequal(what: str, found: dict[str, str], expected: Expectation, cure: str) -> list[str]:
    nodes: dict[str, list[str]] = {}
    for node, value in found.items():
        nodes.setdefault(value, []).append(node)
    if len(nodes) < 2:
        return []
    values = "; ".join(f"{value} on {_names(where, expected)}" for value, where in nodes.items())
    return [f"{what} differs: {values}: {cure}"]


def _grouped(found: Iterable[tuple[str, str]], expected: Expectation) -> list[str]:
    """One line for a problem that several nodes have."""
    nodes: dict[str, list[str]] = {}
    for node, text in found:
        nodes.setdefault(text, []).append(node)
    return [f"{_names(where, expected)}: {text}" for text, where in nodes.items()]


def _names(nodes: Sequence[str], expected: Expectation) -> str:
    if len(nodes) == len(expected.nodes) > 1:
        return f"all {len(nodes)} nodes"
    return ", ".join(nodes)
