"""``.metadata``, the pickle in a distributed checkpoint, read without running what it says.

A pickle names functions, and unpickling calls them. torch's ``FileSystemReader`` unpickles ``.metadata`` without
restriction, so :func:`read_metadata` reads the file first, with the classes of the format and no others: what passes is
safe for torch to read again. The other pickles of a checkpoint (``common.pt``, the tensors and objects inside
``*.distcp``) go through ``torch.load``, which has allowed listed classes only since torch 2.6.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_oisd.convert.output import brief
from megatron_oisd.errors import OISDError

METADATA = ".metadata"

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    # Megatron keeps the ranks' plans next to the metadata.
    "torch.distributed.checkpoint.planner": {
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of the format")
        return super().find_class(module, name)


def read_metadata(iteration_directory: Path) -> Any:
    """Return torch's ``Metadata`` of one iteration, after checking that what it says is possible.

    Raises:
        OISDError: the file is missing or damaged, names foreign code, or places data outside the directory.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = iteration_directory / METADATA
    cure = "save or convert it again, or load another one with --iteration"
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        for piece in (metadata.storage_data or {}).values():
            name = piece.relative_path
            if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
                raise pickle.UnpicklingError(f"it names the file {str(name)[:200]!r}, outside the directory")
            if not (type(piece.offset) is int and type(piece.length) is int and min(piece.offset, piece.length) >= 0):
                raise pickle.UnpicklingError(f"it places data at {piece.offset!r}")
    except FileNotFoundError:
        raise OISDError(f"checkpoint {iteration_directory} is incomplete: {METADATA} is missing; {cure}") from None
    except Exception as error:  # unpickling garbage raises nearly anything
        raise OISDError(
            f"checkpoint {iteration_directory} is damaged: its metadata cannot be read ({brief(error)}); {cure}"
        ) from None
    return metadata
