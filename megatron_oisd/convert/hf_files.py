"""HF checkpoint directories: config, tokenizer and safetensors, read with an explanation where they are damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.convert.families import IGNORED_HF_SUFFIXES, hf_shapes
from megatron_oisd.convert.manifest import check_sizes
from megatron_oisd.convert.output import INCOMPLETE, brief, replace_directory
from megatron_oisd.convert.safetensors_io import DTYPES, INDEX, StoredTensor, read_header, read_json, read_tensor
from megatron_oisd.convert.weights import check_tensor_names
from megatron_oisd.errors import OISDError
from megatron_oisd.runtime.model import ModelArguments

HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of an HF checkpoint that are kept next to the weights."""

MAX_BLOCKS = 1_000_000
"""Largest number of layers times experts that is taken for a model's; the largest public ones have 1/20 of it."""


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Parse ``config.json`` of an HF checkpoint directory; :class:`OISDError` where it is missing or no JSON object."""
    path = Path(directory) / "config.json"
    try:
        config = read_json(path)
    except OSError:
        raise OISDError(
            f"{path} cannot be read: expected a directory in HF format (config.json, *.safetensors)"
        ) from None
    if not isinstance(config, dict):
        raise OISDError(f"{path} holds no JSON object: download the model again")
    counts = {key: config.get(key) for key in ("num_hidden_layers", "num_experts", "num_local_experts")}
    layers, *experts = (count if isinstance(count, int) and count > 1 else 1 for count in counts.values())
    blocks = layers * max(experts)  # bounded before anybody makes a list of that length
    if blocks > MAX_BLOCKS:
        raise OISDError(
            f"{path} describes {blocks} layers and experts, expected at most {MAX_BLOCKS}: it is no model's"
        )
    return config


def copy_hf_files(source: str | Path, target: str | Path) -> None:
    """Copy config, tokenizer and generation settings, replacing the directory ``target`` in one step."""
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        return
    work = target.with_name(f".{target.name}{INCOMPLETE}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in HF_FILES:
        if (source / name).is_file():
            shutil.copyfile(_inside(source, name), work / name)
    replace_directory(work, target)


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of an HF checkpoint directory by name, each read from disk into memory of its own when asked for.

    The constructor reads every header and refuses what does not fit together; see also :meth:`check`.

    Args:
        directory: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Raises:
        OISDError: no safetensors, a shard is missing, damaged or outside the directory, or index and shards disagree.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        check_sizes(self.directory, (".safetensors",))
        index, single = self.directory / INDEX, self.directory / "model.safetensors"
        if index.is_file() and single.is_file():
            raise OISDError(
                f"{self.directory} has both {single.name} and {INDEX}: delete the one that is not the model"
            )
        self._where: dict[str, tuple[Path, StoredTensor]] = {}
        if index.is_file():
            self._read_shards(index)
        elif single.is_file():
            path = _inside(self.directory, single.name)
            self._where = {name: (path, tensor) for name, tensor in read_header(path).items()}
        else:
            patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
            others = any(next(self.directory.glob(pattern), None) for pattern in patterns)
            reason = "only pickled weights, which are not read" if others else "no weights"
            raise OISDError(f"{self.directory} has {reason}: expected model.safetensors or its shards with their index")

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._where[name]
        self._check_dtype(name)
        try:
            return read_tensor(path, stored)
        except OSError as error:
            raise OISDError(f"{path} cannot be read at {name} ({brief(error)}): download the model again") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from its header."""
        return self._where[name][1].shape

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor, from its header."""
        self._check_dtype(name)
        dtype = self._where[name][1].torch_dtype
        assert dtype is not None
        return dtype

    def dtype(self) -> torch.dtype:
        """Return the common dtype of all weights, float32 where they differ; reads no tensor."""
        weights = [name for name in self._where if not name.endswith(IGNORED_HF_SUFFIXES)]
        return common_dtype({self.dtype_of(name) for name in weights})

    def check(self, arguments: ModelArguments) -> None:
        """Raise :class:`OISDError` unless the tensors are those of the model: names, shapes and types; reads none."""
        if arguments.num_layers > len(self):  # before a list of absurd length is made
            raise OISDError(
                f"config.json says {arguments.num_layers} layers, and {self.directory} has {len(self)} tensors: "
                f"it is another model's"
            )
        check_tensor_names(arguments, self, str(self.directory))
        for name in self:
            if not name.endswith(IGNORED_HF_SUFFIXES):
                self._check_dtype(name)
        for name, shape in hf_shapes(arguments).items():
            if name in self._where and self.shape(name) != shape:  # fused experts are checked when they are read
                raise OISDError(
                    f"{self.directory}: {name} has shape {self.shape(name)}, and config.json says {shape}: "
                    f"it is another model's"
                )

    def _check_dtype(self, name: str) -> None:
        path, stored = self._where[name]
        if stored.torch_dtype is None:
            raise OISDError(
                f"{path}: {name} is stored as {stored.dtype}, expected one of {', '.join(DTYPES)}: quantised weights "
                f"cannot be trained"
            )

    def _read_shards(self, index: Path) -> None:
        content = read_json(index)
        placed = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise OISDError(f"{index} is not a valid safetensors index: download the model again")
        for file in sorted(set(placed.values())):
            path = _inside(self.directory, file)
            if not path.is_file():
                raise OISDError(f"{path} is missing: the checkpoint is incomplete, download the model again")
            for name, tensor in read_header(path).items():
                if placed.get(name) != file:
                    other = f"{INDEX} places in {placed[name]}" if name in placed else f"{INDEX} does not list"
                    raise OISDError(f"{path} has {name}, which {other}: download the model again")
                self._where[name] = (path, tensor)
        absent = next((name for name in placed if name not in self._where), None)
        if absent is not None:
            raise OISDError(
                f"{self.directory / placed[absent]} lacks {absent}, which {INDEX} places there: "
                f"download the model again"
            )


def _inside(directory: Path, name: str) -> Path:
    """Return the path of a file of the directory; :class:`OISDError` where it would be a file elsewhere.

    The cache of huggingface_hub is understood: its ``snapshots/REVISION/FILE`` are links to ``blobs/DIGEST``.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise OISDError(f"{directory} names the file {name[:200]!r}: expected a file name without a path")
    root, target = directory.resolve(), (directory / name).resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if not any(home in target.parents for home in homes):
        raise OISDError(f"{directory / name} is a link to {target}, outside the model's directory: copy the file here")
    return directory / name


def load_tokenizer(directory: str | Path) -> Any:
    """Return a checkpoint's tokenizer, None where there are no tokenizer files; :class:`OISDError` for damaged ones."""
    directory = Path(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise OISDError(f"the tokenizer in {directory} cannot be loaded ({brief(error)}): download it again") from error


def tokenizer_size(directory: str | Path) -> int | None:
    """Return the number of tokens of a checkpoint's tokenizer, None where there are no tokenizer files."""
    tokenizer = load_tokenizer(directory)
    return None if tokenizer is None else len(tokenizer)


def common_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the one dtype in the set, or float32, which loses none of them."""
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
