"""The safetensors format, read and written one tensor at a time.

::

    8 bytes        n, the length of the header: unsigned, little-endian
    n bytes        the header: a JSON object, padded with spaces
                   {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
                    "__metadata__": {"format": "pt"}}
    the rest       the data; offsets count from its first byte; tensors lie next to each other without gaps,
                   row-major, little-endian

Source: https://huggingface.co/docs/safetensors ("Format"), whose own limits are kept (header of at most 100 MB, no
duplicate names, no gaps and no overlaps).

Why not the safetensors package: it maps a file into memory, so that everything that was read from a shard stays in
the resident size, and it writes a shard from tensors that are all in memory. The files are the same, which the tests
check with the package.

Nothing in a file is trusted: a header is read completely and checked against the file's size before any tensor is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.convert.manifest import HashingStream
from megatron_oisd.convert.output import brief
from megatron_oisd.errors import OISDError

INDEX = "model.safetensors.index.json"
"""Name of the file that says which shard holds which tensor."""
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 256 * 2**20
"""Largest JSON file that is parsed."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Stored types of weights that can be converted."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64},
    **{"C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_AGAIN = "download the model again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a type that is not a weight's: integers, fp8, booleans."""
        return DTYPES.get(self.dtype)


def parse_json(path: Path, text: bytes) -> Any:
    """Parse JSON strictly; :class:`OISDError` naming ``path`` for nonsense, repeated keys and absurd nesting."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _RepeatedKeyError as error:
        raise OISDError(f"{path} names {error} twice: {_AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise OISDError(f"{path} is not valid JSON ({brief(error)}): {_AGAIN}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file, see :func:`parse_json`; OSError where there is none."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise OISDError(f"{path} has {size} bytes, expected at most {MAX_JSON_BYTES}: it is no {path.name}")
    return parse_json(path, path.read_bytes())


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, after checking that every byte the header claims is there.

    Raises:
        OISDError: the file is no safetensors, damaged, truncated or inconsistent; the line says where.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            _refuse_pickles(path, start)
            if len(start) < 8:
                raise OISDError(f"{path} is damaged: {size} bytes are no safetensors file: {_AGAIN}")
            length = int.from_bytes(start, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise OISDError(
                    f"{path} is damaged: its header claims {length} bytes, and the file has {size}: {_AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise OISDError(f"{path} cannot be read ({brief(error)}): {_AGAIN}") from error
    header = parse_json(path, text)
    if not isinstance(header, dict):
        raise OISDError(f"{path} is damaged: its header is no JSON object: {_AGAIN}")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise OISDError(f"{path} is damaged: {name} begins at byte {tensor.begin}, expected {position}: {_AGAIN}")
        position = tensor.end
    if position != size:
        raise OISDError(f"{path} is damaged: it has {size} bytes, and its header describes {position}: {_AGAIN}")
    return tensors


def read_tensor(path: Path, tensor: StoredTensor) -> Tensor:
    """Read one tensor into memory of its own; OSError where the bytes cannot be read."""
    assert tensor.torch_dtype is not None
    data = torch.empty(tensor.end - tensor.begin, dtype=torch.uint8)
    if data.numel():
        with open(path, "rb", buffering=0) as file:
            file.seek(tensor.begin)
            view = data.numpy().data
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{path} ended early")
                view = view[count:]
    return data.view(tensor.torch_dtype).reshape(tensor.shape)


class ShardedWriter:
    """Writes tensors that arrive one by one, in a known order, into ``model*.safetensors`` and their index.

    The header stands before the data, so the shapes must be known beforehand. At any time one tensor is in memory.

    Args:
        directory: where the files go.
        shapes: every tensor and its shape, in the order in which they will arrive.
        dtype: of all tensors.
        shard_bytes: size of a file's data above which a new one begins (a single tensor may be larger).
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
    ) -> None:
        self._directory, self._shapes, self.dtype = directory, dict(shapes), dtype
        self._shards: list[list[str]] = []
        filled = 0
        for name, shape in self._shapes.items():
            size = math.prod(shape) * dtype.itemsize
            if not self._shards or (self._shards[-1] and filled + size > shard_bytes):
                self._shards.append([])
                filled = 0
            self._shards[-1].append(name)
            filled += size
        self.digests: dict[str, str] = {}
        """sha256 of every file that is written, by name; known without reading it again."""

    @property
    def files(self) -> dict[str, list[str]]:
        """Names of the files and of the tensors in them."""
        count = len(self._shards)
        if count == 1:
            return {"model.safetensors": self._shards[0]}
        return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(self._shards, 1)}

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all of them and, where there is more than one file, the index.

        Raises:
            OISDError: the files cannot be written.
        """
        arriving = iter(tensors)
        try:
            for file, names in self.files.items():
                with self._shard(file, names) as stream:
                    for expected in names:
                        name, tensor = next(arriving)
                        assert name == expected, f"{name} arrived where {expected} was expected"
                        assert tuple(tensor.shape) == self._shapes[name], f"{name}: {tuple(tensor.shape)}"
                        data = tensor.detach().to("cpu", self.dtype).contiguous()
                        del tensor
                        if data.numel():
                            stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
                        del data
            assert next(arriving, None) is None, "more tensors than were announced"
            if len(self._shards) > 1:
                self._write_index()
        except OSError as error:
            raise OISDError(f"cannot write weights to {self._directory} ({error}): check the free space") from error

    @contextmanager
    def _shard(self, file: str, names: list[str]) -> Iterator[HashingStream]:
        offset, header = 0, {"__metadata__": {"format": "pt"}}
        for name in names:
            size = math.prod(self._shapes[name]) * self.dtype.itemsize
            entry: Any = {"dtype": _NAMES[self.dtype], "shape": self._shapes[name]}
            header[name] = entry | {"data_offsets": (offset, offset + size)}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data on multiples of eight bytes, as the package writes it
        with open(self._directory / file, "wb") as raw, closing(HashingStream(raw)) as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            yield stream
            self.digests[file] = stream.finish()

    def _write_index(self) -> None:
        total = sum(map(math.prod, self._shapes.values()))
        index = {
            "metadata": {"total_parameters": total, "total_size": total * self.dtype.itemsize},
            "weight_map": {name: file for file, names in self.files.items() for name in names},
        }
        (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1)[:200])
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _refuse_pickles(path: Path, start: bytes) -> None:
    # Both beginnings are the low bytes of possible header lengths too; the high ones tell.
    if start.startswith((b"PK\3\4", b"\x80")) and int.from_bytes(start, "little") > MAX_HEADER_BYTES:
        raise OISDError(
            f"{path} is a pickle file (torch.save) under a safetensors name, which is not read: "
            f"save the model with save_pretrained"
        )


def _entry(path: Path, name: str, value: Any, data_start: int) -> StoredTensor:
    def integers(items: Any) -> bool:
        return isinstance(items, list) and all(type(item) is int and item >= 0 for item in items)

    if not (isinstance(value, dict) and integers(value.get("shape")) and integers(value.get("data_offsets"))):
        raise OISDError(f"{path} is damaged: its header describes {name[:200]} wrongly: {_AGAIN}")
    dtype, shape, offsets = value.get("dtype"), tuple(value["shape"]), value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise OISDError(f"{path}: {name} is stored as {dtype!r}, expected one of {', '.join(DTYPES)}")
    bits = math.prod(shape) * _BITS[dtype]
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise OISDError(f"{path} is damaged: {name} of shape {list(shape)} needs {bits // 8} bytes: {_AGAIN}")
    return StoredTensor(dtype, shape, data_start + offsets[0], data_start + offsets[1])
