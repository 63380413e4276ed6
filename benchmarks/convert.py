"""Converting full-size checkpoints on a CPU: GB/s against plain copying and against mbridge, and peak memory.

The checkpoints have the shapes of Qwen3-0.6B and Llama-3.2-1B and random bf16 weights; they are written here, tensor by
tensor. Every run is a process of its own, which first converts a model of no size, so that all is imported. Then the
kernel's peak of its resident memory is reset; what it rises above the resident memory at that moment is the run's. The
runs of a round take turns, in a rotated order; files are read from the page cache and end on the disk (``fsync``) in
every run. Ratios are medians of the rounds' own: a run against the copy, and against mbridge, of the same round.

mbridge (``pip install --no-deps mbridge==0.15.1 einops``) converts between an HF directory and a model in memory. Its
runs build that model (this package's builder, on the CPU), and write or load Megatron's checkpoint with this package.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import harness

_COMMON = {"attention_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        **_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 28,
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 16,
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
    "tiny": {
        **_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 2,
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "vocab_size": 384, "max_position_embeddings": 64, "rope_theta": 10000,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

_COLUMNS = {
    "model": "model", "run": "run", "s p20": "p20", "p50": "p50", "p80": "p80", "CPU s p50": "cpu_p50",
    "GB/s": "gb_per_s", "time / copy": "time_over_copy", "time / mbridge": "time_over_mbridge",
    "lowest": "time_over_mbridge_min", "highest": "time_over_mbridge_max",
    "peak MiB": "peak_mib", "largest tensor MiB": "largest_mib",
    "peak / largest": "peak_over_largest", "model MiB": "model_mib", "note": "note",
}  # fmt: skip


def write_checkpoint(directory: Path, config: dict[str, Any]) -> int:
    """Write an HF checkpoint of that shape with random weights, holding one tensor at a time; return its bytes."""
    from megatron_oisd.convert.families import arguments_from_hf_config, hf_shapes
    from megatron_oisd.convert.safetensors_io import ShardedWriter

    shapes = hf_shapes(arguments_from_hf_config(config))
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02
            yield name, noise + 1 if len(shape) == 1 else noise

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ShardedWriter(directory, shapes, torch.bfloat16, shard_bytes=5 * 10**9).write(tensors())
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------- runs


def _copy(hf: Path, out: Path) -> None:
    out.mkdir()
    for path in hf.iterdir():
        shutil.copyfile(path, out / path.name)
    _sync(out)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*")]:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _to_mcore(verify: str) -> Callable[[Path, Path], None]:
    def run(hf: Path, out: Path) -> None:
        from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore

        convert_hf_to_mcore(hf, out, verify=verify, progress=False)  # type: ignore[arg-type]

    return run


def _to_hf(verify: str) -> Callable[[Path, Path], None]:
    def run(mcore: Path, out: Path) -> None:
        from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf

        convert_mcore_to_hf(mcore, out, verify=verify, progress=False)  # type: ignore[arg-type]

    return run


def _mbridge(hf: Path) -> tuple[Any, Any, Any]:
    """A bridge, an empty model and its arguments; the bridge learns the names of Megatron's own layer modules."""
    from mbridge import AutoBridge

    from megatron_oisd.convert.families import arguments_from_hf_config
    from megatron_oisd.convert.hf_files import read_hf_config
    from megatron_oisd.runtime.model import build_model, transformer_config

    arguments = arguments_from_hf_config(read_hf_config(hf))
    config = transformer_config(arguments, dtype=torch.bfloat16, perform_initialization=False)
    chunks = build_model(arguments, config)
    bridge = AutoBridge.from_pretrained(hf)
    layer = "model.layers.{layer_number}"
    bridge._OTHER_MAPPING = {"input_layernorm.weight": [f"{layer}.input_layernorm.weight"]}
    bridge._MLP_MAPPING = bridge._MLP_MAPPING | {
        "pre_mlp_layernorm.weight": [f"{layer}.post_attention_layernorm.weight"]
    }
    return bridge, chunks, arguments


@torch.no_grad()
def _mbridge_to_mcore(hf: Path, out: Path) -> None:
    from megatron_oisd.convert.checkpoint import save_model
    from megatron_oisd.convert.verify import single_process

    with single_process():
        bridge, chunks, arguments = _mbridge(hf)
        bridge.load_weights(chunks, str(hf))
        save_model(chunks, out, 0, arguments, hf_source=hf)


@torch.no_grad()
def _mbridge_to_hf(mcore: Path, out: Path) -> None:
    from megatron_oisd.convert.checkpoint import load_model
    from megatron_oisd.convert.verify import single_process

    with single_process():
        bridge, chunks, _ = _mbridge(mcore / "hf")
        load_model(chunks, mcore)
        bridge.safetensor_io = bridge._get_safetensor_io(str(mcore / "hf"))
        bridge.save_weights(chunks, str(out))
    _sync(out)


COPY = "copy (shutil.copyfile)"
RUNS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {  # each beside what it is compared with
    COPY: ("hf", _copy),
    "HF to Megatron": ("hf", _to_mcore("none")),
    "HF to Megatron, mbridge": ("hf", _mbridge_to_mcore),
    "HF to Megatron, tensors verified": ("hf", _to_mcore("tensors")),
    "Megatron to HF": ("mcore", _to_hf("none")),
    "Megatron to HF, mbridge": ("mcore", _mbridge_to_hf),
    "Megatron to HF, tensors verified": ("mcore", _to_hf("tensors")),
}


def _child(run: str, source: Path, target: Path, tiny: Path) -> None:
    """Warm up on a model of no size, then do the run and print what it took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    _to_mcore("tensors")(tiny, work / "mcore")
    _to_hf("tensors")(work / "mcore", work / "hf")
    if "mbridge" in run:
        _mbridge_to_mcore(tiny, work / "mbridge")
    shutil.rmtree(work)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start, start_cpu = _resident("VmRSS"), time.perf_counter(), time.process_time()
    RUNS[run][1](source, target)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": _resident("VmHWM") - before, "before": before}))


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


def _in_process(run: str, source: Path, target: Path, tiny: Path) -> dict[str, Any]:
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.convert", "--child", run, str(source), str(target), str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(target, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{run}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(model: str, work: Path, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """Rows: one for each run, with a note where it could not be made."""
    from megatron_oisd.convert.safetensors_io import read_header

    hf, mcore, tiny = work / "hf", work / "mcore", work / "tiny"
    for directory in (hf, mcore, tiny):
        shutil.rmtree(directory, ignore_errors=True)
    size = write_checkpoint(hf, SHAPES[model])
    write_checkpoint(tiny, SHAPES["tiny"])
    largest = max(tensor.end - tensor.begin for tensor in read_header(hf / "model.safetensors").values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _to_mcore("none")(hf, mcore)
    sources = {"hf": hf, "mcore": mcore}
    samples: dict[str, list[dict[str, Any]]] = {run: [] for run in names}
    notes = dict.fromkeys(names, "")
    for number in range(repeats):
        for run in tqdm(names[number % len(names) :] + names[: number % len(names)], desc=f"{model} {number + 1}"):
            if notes[run]:
                continue
            if "mbridge" in run and harness.installed_version("mbridge") is None:
                notes[run] = "mbridge is not installed"
                continue
            try:
                samples[run].append(_in_process(run, sources[RUNS[run][0]], work / "out", tiny))
            except RuntimeError as error:
                notes[run] = str(error)[:200]
    rows = []
    for run, found in samples.items():
        row: dict[str, Any] = {"model": model, "run": run, "note": notes[run]}
        if found:
            over_copy = _ratios(found, samples[COPY])
            over_mbridge = _ratios(found, samples.get(f"{run.split(',')[0]}, mbridge", []))
            timing, peak = harness.Timing.of(f["seconds"] for f in found), max(f["peak"] for f in found)
            row |= {
                **vars(timing), "cpu_p50": harness.Timing.of(f["cpu"] for f in found).p50,
                "gb_per_s": size / timing.p50 / 1e9, "time_over_copy": harness.Timing.of(over_copy).p50,
                "peak_mib": peak / 2**20, "largest_mib": largest / 2**20, "peak_over_largest": peak / largest,
                "model_mib": size / 2**20, "interpreter_mib": found[0]["before"] / 2**20, "repeats": len(found),
            }  # fmt: skip
            if over_mbridge:
                row |= {
                    "time_over_mbridge": harness.Timing.of(over_mbridge).p50,
                    "time_over_mbridge_min": min(over_mbridge), "time_over_mbridge_max": max(over_mbridge),
                }  # fmt: skip
        rows.append(row)
    return rows


def _ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    """Seconds of a run over those of another one in the same round; nothing where the other was not made."""
    if len(ours) != len(theirs):
        return []
    return [one["seconds"] / other["seconds"] for one, other in zip(ours, theirs, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(SHAPES), help="default: both full sizes")
    parser.add_argument("--run", action="append", choices=[name for name in RUNS if name != COPY], help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model of no size, once, to try the command")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, 10 GB; default: a temporary one")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the rows")
    parser.add_argument("--child", nargs=4, metavar=("RUN", "SOURCE", "TARGET", "TINY"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        run, *paths = options.child
        _child(run, *map(Path, paths))
        return
    torch.set_num_threads(1)
    models = ["tiny"] if options.tiny else options.model or [name for name in SHAPES if name != "tiny"]
    names = [name for name in RUNS if name == COPY or not options.run or name in options.run]
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            rows += measure(model, Path(work), 1 if options.tiny else options.repeats, names)
    record = harness.environment("cpu") | {"mbridge": harness.installed_version("mbridge")}
    harness.write_rows(options.out / "convert-cpu.jsonl", record, rows)
    print(harness.markdown(rows, _COLUMNS))


if __name__ == "__main__":
    main()
