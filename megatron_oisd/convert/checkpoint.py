"""Checkpoints on disk: Megatron-LM's directory layout, made self-contained and written atomically.

::

    DIR/latest_checkpointed_iteration.txt   the newest whole iteration; written last
    DIR/iter_0000100/                       torch_dist format of megatron.core.dist_checkpointing, any TP/PP layout
    DIR/hf/                                 config.json, tokenizer, generation_config.json: what an HF export needs

Writing is synchronous and in this process. Megatron's default strategy forks writers and starts a manager process,
which needs a main guard in the calling script and is refused inside daemonic processes; the files are the same.

Everything here but :func:`latest_iteration`, :func:`read_arguments` and the HF readers is a collective over all ranks
(``dist_checkpointing`` uses the default group) on a file system that all ranks see. The pickles in a checkpoint are
read with lists of allowed classes only, see :mod:`megatron_oisd.convert.safe_pickle`.
"""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.convert.families import arguments_from_hf_config
from megatron_oisd.convert.hf_files import common_dtype, copy_hf_files, read_hf_config
from megatron_oisd.convert.manifest import check_sizes, write_manifest
from megatron_oisd.convert.output import INCOMPLETE, LATEST, brief, replace_directory, sync_directory, write_text
from megatron_oisd.convert.safe_pickle import METADATA, read_metadata
from megatron_oisd.convert.safetensors_io import DTYPES, read_json
from megatron_oisd.convert.torch_dist import DEFAULT_KEYS, MODEL_PREFIXES, KeyStyle, sharded_state, streaming_strategy
from megatron_oisd.convert.weights import unwrap
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

HF_DIRECTORY = "hf"


def save_model(
    chunks: list[nn.Module],
    directory: str | Path,
    iteration: int,
    arguments: ModelArguments,
    *,
    hf_source: str | Path | None = None,
    extra_state: dict[str, Any] | None = None,
    materialise: Callable[[Tensor], Tensor] | None = None,
    manifest: bool = False,
    style: KeyStyle = DEFAULT_KEYS,
) -> Path:
    """Write ``DIR/iter_NNNNNNN`` and make it the latest; a collective over all ranks.

    The iteration appears under its name only when it is whole, and ``latest`` names it only after that: a killed run
    leaves at most a hidden ``.incomplete`` directory, which the next save of that iteration removes. An iteration that
    exists is replaced.

    Args:
        chunks: this rank's model chunks, bare or wrapped.
        directory: the checkpoint's directory, made if missing.
        iteration: number of finished iterations.
        arguments: the model's shape, stored as Megatron-LM's ``args`` (which its loader reads).
        hf_source: directory whose :data:`HF_FILES` are copied to ``DIR/hf``; needed once for a new directory.
        extra_state: merged into the saved state: sharded optimizer state, or plain values equal on all ranks.
        materialise: gives the data of parameters on the ``meta`` device when they are written, see
            :mod:`megatron_oisd.convert.torch_dist`.
        manifest: write ``manifest.json`` with the sha256 of every file, which each rank takes of its own while it
            writes them; nothing that loads needs it.
        style: names of the parameters in the checkpoint.

    Returns:
        The directory of the iteration.

    Raises:
        OISDError: the directory cannot be written, on every rank.
    """
    from megatron.core import dist_checkpointing

    directory = Path(directory)
    target = directory / iteration_name(iteration)
    work = directory / f".{target.name}{INCOMPLETE}"
    digests: dict[str, str] | None = {} if manifest else None
    state = model_state(chunks, style)
    for model in state.values():
        _add_empty_extra_states(model)
    clash = sorted({*state, "args", "iteration", "checkpoint_version"} & set(extra_state or {}))
    assert not clash, f"extra_state may not contain {clash}"
    state |= {"iteration": iteration, "checkpoint_version": 3.0, "args": _megatron_args(chunks, arguments)}
    state |= extra_state or {}

    def prepare() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if hf_source is not None:
            copy_hf_files(hf_source, directory / HF_DIRECTORY)

    def publish() -> None:
        if manifest:
            write_manifest(work, digests={name: digest for found in of_ranks for name, digest in found.items()})
            if hf_source is not None:
                write_manifest(directory / HF_DIRECTORY)
        sync_directory(work)
        replace_directory(work, target)
        write_text(directory / LATEST, f"{iteration}\n")

    try:
        _on_rank_0(prepare, f"cannot write checkpoint {directory}")
        _collectively(
            lambda: dist_checkpointing.save(
                state, str(work), sharded_strategy=streaming_strategy(materialise, digests)
            ),
            f"cannot write checkpoint {target}",
            "check the free space and that all ranks see this file system",
        )
        of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
        if digests is not None:
            dist.all_gather_object(of_ranks, digests)
        _on_rank_0(publish, f"cannot write checkpoint {target}")
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise
    return target


def load_model(
    chunks: list[nn.Module],
    directory: str | Path,
    iteration: int | None = None,
    *,
    extra_state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fill the model chunks from a checkpoint written at any TP/PP/VPP layout; a collective over all ranks.

    Values are cast to each parameter's dtype. Vocabulary rows that the checkpoint's padding lacks become zero, and
    those that only it has are dropped.

    Args:
        chunks: this rank's model chunks, bare or wrapped.
        directory: the checkpoint's directory.
        iteration: which one; None for the latest.
        extra_state: template of what else to load, e.g. the optimizer's sharded state dict.

    Returns:
        All other entries of the checkpoint: ``iteration``, ``args``, the loaded ``extra_state`` and plain values.

    Raises:
        OISDError: the checkpoint is missing, incomplete, damaged or another model's, on every rank.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    directory = Path(directory)
    path = _collectively(lambda: whole_iteration(directory, iteration), f"cannot read checkpoint {directory}", "")
    template = model_state(chunks, KeyStyle.of(model_tensors(path)))
    names = list(template)
    template |= extra_state or {}
    # Transformer Engine's extra state (fp8 statistics) is absent from checkpoints written without it, and the reverse.
    state, _, unexpected = _collectively(
        lambda: dist_checkpointing.load(template, str(path), strict=StrictHandling.RETURN_UNEXPECTED),
        f"checkpoint {path} cannot be loaded",
        "it is damaged or another model's; load an earlier one with --iteration, or convert the HF model again",
    )
    absent = sorted(key for key in unexpected if "_extra_state" not in key)

    def fill() -> None:
        if absent:
            raise OISDError(
                f"checkpoint {path} lacks {', '.join(absent[:3])}: it is another model's; convert the HF model again"
            )
        for name, chunk in zip(names, chunks, strict=True):
            result = unwrap(chunk).load_state_dict(state.pop(name), strict=False)
            missing = [key for key in result.missing_keys if "_extra_state" not in key]
            if missing:
                raise OISDError(f"checkpoint {path} lacks {', '.join(missing[:3])}: it is another model's")

    _collectively(fill, f"checkpoint {path} cannot be loaded", "")
    return state


def model_state(chunks: list[nn.Module], style: KeyStyle = DEFAULT_KEYS) -> dict[str, Any]:
    """Return the chunks' sharded state dicts under Megatron-LM's keys: ``model``, or ``model0``, ``model1`` for VPP."""
    if len(chunks) == 1:
        return {"model": sharded_state(unwrap(chunks[0]), style)}
    return {f"model{i}": sharded_state(unwrap(chunk), style) for i, chunk in enumerate(chunks)}


def iteration_name(iteration: int) -> str:
    """Return Megatron-LM's directory name of an iteration."""
    return f"iter_{iteration:07d}"


def latest_iteration(directory: str | Path) -> int:
    """Return the iteration that ``latest_checkpointed_iteration.txt`` names.

    Raises:
        OISDError: there is no such file, or it holds no number.
    """
    path = Path(directory) / LATEST
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise OISDError(
            f"{directory} is not a Megatron checkpoint: no readable {LATEST}; "
            f"make one with tools/convert_hf_to_mcore.py"
        ) from None
    if not text.isdecimal():
        raise OISDError(
            f"{path} holds {text[:40]!r}, expected an iteration number: write the number of an iter_ directory"
        )
    return int(text)


def read_arguments(directory: str | Path) -> ModelArguments:
    """Return the shape of the model in a Megatron checkpoint directory, from its ``hf/config.json``.

    Raises:
        OISDError: the file is missing or unreadable, or describes an unsupported model.
    """
    hf = Path(directory) / HF_DIRECTORY
    if not hf.is_dir():
        raise OISDError(
            f"{directory} has no {HF_DIRECTORY}/ with the model's config.json: convert the HF model with "
            f"tools/convert_hf_to_mcore.py, or copy the HF config and tokenizer files there"
        )
    return arguments_from_hf_config(read_hf_config(hf))


def stored_dtype(directory: str | Path, iteration: int | None = None) -> torch.dtype:
    """Return the dtype of the stored model weights: the common one, or float32 where they differ."""
    stored = model_tensors(whole_iteration(directory, iteration))
    return common_dtype({entry.properties.dtype for entry in stored.values()})


def model_tensors(iteration_directory: Path) -> dict[str, Any]:
    """What the metadata of an iteration says of the model's tensors, by key.

    Raises:
        OISDError: there is no readable metadata, or a tensor is no weight's.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = read_metadata(iteration_directory).state_dict_metadata
    found = {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(MODEL_PREFIXES)
    }
    for name, entry in found.items():
        if entry.properties.dtype not in DTYPES.values():
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            raise OISDError(
                f"checkpoint {iteration_directory} stores {name} as {dtype}, expected one of {', '.join(DTYPES)}: "
                f"quantised weights cannot be trained, use those before quantisation"
            )
    return found


def _add_empty_extra_states(state: dict[str, Any]) -> None:
    """Transformer Engine's norms ask a checkpoint for their fp8 state, which is empty where they have none.

    (Its linear layers do too; Megatron's own linear layers, with which checkpoints are made here, save it for them.)
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    for name, weight in list(state.items()):
        extra = name.removesuffix("weight") + "_extra_state"
        if isinstance(weight, ShardedTensor) and weight.key.endswith("norm.weight") and extra not in state:
            layers = weight.prepend_axis_num
            state[extra] = ShardedObject(
                weight.key.removesuffix("weight") + "_extra_state",
                torch.empty(0, dtype=torch.uint8),
                weight.global_shape[:layers] or (1,),
                weight.global_offset[:layers] or (0,),
                weight.replica_id,
            )


def _megatron_args(chunks: list[nn.Module], arguments: ModelArguments) -> argparse.Namespace:
    """What Megatron-LM reads beside the tensors: for its checks, ``--use-checkpoint-args`` and to know what is here."""
    config: Any = unwrap(chunks[0]).config
    return argparse.Namespace(
        **arguments.megatron_args(),
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        padded_vocab_size=arguments.padded_vocab_size(config.tensor_model_parallel_size),
        params_dtype=config.params_dtype,
        ckpt_format="torch_dist",
        # Neither is here in the form in which Megatron-LM saves them, so that it must not look for them.
        no_save_optim=True,
        no_save_rng=True,
        # Its defaults are GPT-2's; what all our families have in common instead.
        group_query_attention=arguments.num_query_groups != arguments.num_attention_heads,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_interleaved=False,
        normalization="RMSNorm",
        norm_epsilon=arguments.layernorm_epsilon,
        apply_layernorm_1p=False,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def whole_iteration(directory: str | Path, iteration: int | None = None) -> Path:
    """Return the directory of the iteration, None for the latest, after checking that every byte is there.

    Raises:
        OISDError: it is missing, incomplete or damaged.
    """
    directory, cure = Path(directory), "save or convert it again, or load another one with --iteration"
    number = latest_iteration(directory) if iteration is None else iteration
    path = directory / iteration_name(number)
    if not path.is_dir():
        there = sorted(p.name for p in directory.glob("iter_*")) if directory.is_dir() else []
        raise OISDError(f"{path} does not exist: expected one of {', '.join(there) or 'no iterations at all'}; {cure}")
    for name in ("metadata.json", METADATA):
        if not (path / name).is_file():
            raise OISDError(f"checkpoint {path} is incomplete: {name} is missing; {cure}")
    try:
        read_json(path / "metadata.json")
    except (OISDError, OSError) as error:
        raise OISDError(
            f"checkpoint {path} is damaged: its metadata cannot be read ({brief(error)}); {cure}"
        ) from error
    metadata = read_metadata(path)
    _check_common_state(path, metadata.state_dict_metadata, cure)
    ends: dict[str, int] = {}
    for piece in (metadata.storage_data or {}).values():
        ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        file_path = path / name
        if not file_path.is_file():
            raise OISDError(f"checkpoint {path} is incomplete: {name} is missing; {cure}")
        if file_path.stat().st_size < end:
            raise OISDError(
                f"checkpoint {path} is damaged: {name} has {file_path.stat().st_size} bytes, expected {end}; {cure}"
            )
    check_sizes(path)
    return path


def _check_common_state(path: Path, entries: dict[str, Any], cure: str) -> None:
    """Plain values lie in ``common.pt`` or, since Megatron-Core 0.19, among the sharded objects."""
    if (path / "common.pt").is_file():
        return
    if not any(name.split("/")[0] == "common_state" for name in entries):
        raise OISDError(f"checkpoint {path} is incomplete: common.pt is missing; {cure}")
    from megatron.core import __version__
    from megatron.core.dist_checkpointing import serialization

    if not hasattr(serialization, "_legacy_common_state_exists"):  # it came with the reader of the newer form
        raise OISDError(
            f"checkpoint {path} has no common.pt: it was written by megatron-core 0.19 or newer, not readable by the "
            f"installed {__version__}; install megatron-core>=0.19, or export it to HF there and convert it again here"
        )


def _on_rank_0(function: Callable[[], None], what: str) -> None:
    """Run on rank 0 only; where it fails, fail on every rank with one line."""
    _collectively(lambda: function() if dist.get_rank() == 0 else None, what, "check its permissions and free space")


def _collectively(function: Callable[[], Any], what: str, cure: str) -> Any:
    """Run on every rank; where any rank fails, raise :class:`OISDError` on all, so that none waits for another.

    The line is the first failing rank's own :class:`OISDError`, or made of ``what``, the error and ``cure``.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    result: Any = None
    line: str | None = None
    cause: BaseException | None = None
    try:
        with warnings.catch_warnings():
            # Megatron-Core's own calls of torch's older checkpoint functions: nothing a user could act on.
            warnings.simplefilter("ignore", FutureWarning)
            result = function()
    except OISDError as error:
        line, cause = str(error), error
    except (Exception, CheckpointException) as error:  # the latter is torch's, and no Exception
        line, cause = f"{what} ({brief(error)}): {cure}", error
    lines: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    first = next((found for found in lines if found), None)
    if first is not None:
        raise OISDError(first) from cause
    return result
