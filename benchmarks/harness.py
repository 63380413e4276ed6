"""Timing, peak memory, the environment's record and the rows of every benchmark.

*Time.* Contenders take turns, one run each per round and in a rotated order, so that a machine that slows down slows
all of them. Wall time, and the process's own CPU time beside it: with one thread the latter does not count waiting for
a core that somebody else holds.

*Peak memory*, in bytes above what was allocated before:

* CUDA: the caching allocator's ``max_memory_allocated``;
* CPU: every allocation and release of PyTorch's CPU allocator, from the profiler, replayed in order. Compiled code and
  the scratch buffers of PyTorch's own kernels are included, those of MKL and oneDNN are not;
* :func:`fake_peak`: the same function on ``FakeTensor`` s, whose storages are tracked by a dispatch mode: sizes that
  fit no machine, exact for every tensor that PyTorch code holds, blind to what a kernel allocates inside.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results"

# -------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Timing:
    """Percentiles in seconds."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(samples: Iterable[float]) -> Timing:
        """Percentiles of ``samples``, linearly interpolated."""
        values = torch.tensor(list(samples), dtype=torch.float64)
        return Timing(*torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


@dataclass(frozen=True)
class Measured:
    """One contender's times."""

    forward: Timing
    total: Timing
    """Forward and backward, wall clock."""
    total_cpu: Timing
    """Forward and backward, CPU time of this process."""


Step = Callable[[Callable[[], None]], None]
"""Runs forward, calls its argument, runs backward."""


def time_interleaved(steps: Mapping[str, Step], *, device: str, repeats: int, warmup: int = 0) -> dict[str, Measured]:
    """Time every step ``repeats`` times, taking turns, after ``warmup`` untimed rounds.

    :mod:`benchmarks.losses` has run everything three times before, so that it needs none.
    """
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(warmup + repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = _one_run(steps[name], device)
            if number >= warmup:
                samples[name].append(taken)
    return {
        name: Measured(*(Timing.of(column) for column in zip(*taken, strict=True))) for name, taken in samples.items()
    }


def _one_run(step: Step, device: str) -> tuple[float, float, float]:
    gc.collect()
    middle = 0.0

    def between() -> None:
        nonlocal middle
        _synchronize(device)
        middle = time.perf_counter()

    _synchronize(device)
    start, start_cpu = time.perf_counter(), time.process_time()
    step(between)
    _synchronize(device)
    stop, stop_cpu = time.perf_counter(), time.process_time()
    return middle - start, stop - start, stop_cpu - start_cpu


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------ memory


def peak_bytes(function: Callable[[], Any], *, device: str) -> int:
    """Peak of live bytes above what is allocated at the call."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class StorageMeter(TorchDispatchMode):
    """Peak bytes of the storages that operations inside the mode create; ``known`` tensors' storages do not count."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._tracked = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._tracked:
            return
        self._tracked.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._tracked.discard(key)
        self.live -= size


def fake_peak(make: Callable[[], tuple[Callable[[], Any], list[Tensor]]]) -> int:
    """Peak bytes of ``function`` above ``inputs`` on fake tensors; ``make`` returns both and is called in fake mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        function, inputs = make()
        with StorageMeter(inputs) as meter:
            function()
    return meter.peak


# ----------------------------------------------------------------------------------------- environment and rows


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to judge the rows."""
    record: dict[str, Any] = {
        "torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu_model(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_1min": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    if device == "cuda":
        record |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in ("liger-kernel", "trl", "triton", "megatron-core", "transformers"):
        record[name] = installed_version(name)
    return record


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "")]
    return f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family')}, {' '.join(flags)})"


def write_rows(path: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, the environment first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"environment": record}), *(json.dumps(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def markdown(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table of the rows; ``columns`` maps headings to the rows' keys."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
