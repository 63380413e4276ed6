"""HF checkpoint directories: config, tokenizer and safetensors, read with an explanation where they are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.convert.output import INCOMPLETE, brief, replace_directory
from megatron_oisd.errors import OISDError

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

_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Parse ``config.json`` of an HF checkpoint directory; :class:`OISDError` where it is missing or no JSON object."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise OISDError(
            f"{path} cannot be read: expected a directory in HF format (config.json, *.safetensors)"
        ) from None
    except ValueError as error:
        raise OISDError(f"{path} is not valid JSON ({brief(error)}): download the model again") from None
    if not isinstance(config, dict):
        raise OISDError(f"{path} holds no JSON object: download the model again")
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
            shutil.copyfile(source / name, work / name)
    replace_directory(work, target)


class SafetensorsDirectory(Mapping[str, Tensor]):
    """The tensors of an HF checkpoint directory by name, read from disk when they are asked for.

    Args:
        directory: holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Raises:
        OISDError: no safetensors, a shard is missing or truncated, or index and shards disagree.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                self._file_of = {str(name): str(file) for name, file in mapping.items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise OISDError(f"{index} is not a valid safetensors index: download the model again") from None
            for name, file in self._file_of.items():
                if name not in self._names_in(file):
                    raise OISDError(
                        f"{self.directory / file} lacks {name}, which {index.name} places there: "
                        f"download the model again"
                    )
        elif (self.directory / "model.safetensors").is_file():
            self._file_of = dict.fromkeys(self._names_in("model.safetensors"), "model.safetensors")
        else:
            others = any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt*"))
            reason = "only pickled weights, which are not read" if others else "no weights"
            raise OISDError(f"{self.directory} has {reason}: expected model.safetensors or its shards with their index")

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        try:
            tensor: Tensor = self._open(file).get_tensor(name)
        except Exception as error:
            raise OISDError(
                f"{self.directory / file} cannot be read at {name} ({brief(error)}): download the model again"
            ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def dtype(self) -> torch.dtype:
        """Return the common dtype of all tensors, float32 where they differ; reads headers only."""
        found = set()
        for name, file in self._file_of.items():
            stored = self._open(file).get_slice(name).get_dtype()
            if stored not in _SAFETENSORS_DTYPES:
                raise OISDError(
                    f"{self.directory / file}: {name} is stored as {stored}, expected one of "
                    f"{', '.join(_SAFETENSORS_DTYPES)}: quantised weights cannot be trained"
                )
            found.add(_SAFETENSORS_DTYPES[stored])
        return common_dtype(found)

    def _names_in(self, file: str) -> set[str]:
        return set(self._open(file).keys())

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            path = self.directory / file
            if not path.is_file():
                raise OISDError(f"{path} is missing: the checkpoint is incomplete, download the model again")
            try:
                self._files[file] = safe_open(path, framework="pt", device="cpu")
            except Exception as error:
                raise OISDError(f"{path} is damaged ({brief(error)}): download the model again") from error
        return self._files[file]


def tokenizer_size(directory: str | Path) -> int | None:
    """Return the number of tokens of a checkpoint's tokenizer, None where there are no tokenizer files."""
    directory = Path(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return len(AutoTokenizer.from_pretrained(directory, trust_remote_code=False))
    except Exception as error:
        raise OISDError(f"the tokenizer in {directory} cannot be loaded ({brief(error)}): download it again") from error


def common_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the one dtype in the set, or float32, which loses none of them."""
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
