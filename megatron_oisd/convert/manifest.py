"""``manifest.json``: what a converter wrote, so that a later reader can tell whether it is still that.

::

    {"format": 1,
     "files": {"model.safetensors": {"size": 1234, "sha256": "...", "tensors": 310}, ...}}

It is the last file that is written. :func:`check_sizes` is cheap and runs at every load; :func:`check_manifest` reads
every byte. A manifest shows accidents, not attacks: who can change a file can change its line here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from megatron_oisd.convert.output import brief, write_text
from megatron_oisd.errors import OISDError

MANIFEST = "manifest.json"
_BLOCK = 4 * 2**20


class HashingStream:
    """A binary file that is only appended to, with the sha256 of all that went through it.

    One thread hashes a block and another one writes it while the next block is filled.

    Args:
        raw: the file.
        hashed: False to leave out the hashing; :meth:`finish` then returns an empty string.
    """

    def __init__(self, raw: IO[bytes], *, hashed: bool = True) -> None:
        self._raw, self._position = raw, 0
        self._digest = hashlib.sha256() if hashed else None
        self._workers = ThreadPoolExecutor(2)
        self._filling, self._other = memoryview(bytearray(_BLOCK)), memoryview(bytearray(_BLOCK))
        self._filled = 0
        self._underway: list[Future[Any]] = []

    def write(self, data: Any) -> int:
        """Append bytes, or anything with a buffer of bytes; the caller may change it afterwards."""
        view = memoryview(data).cast("B")
        count = len(view)
        while view:
            taken = min(len(view), _BLOCK - self._filled)
            self._filling[self._filled : self._filled + taken] = view[:taken]
            self._filled += taken
            view = view[taken:]
            if self._filled == _BLOCK:
                self._hand_over()
        self._position += count
        return count

    def tell(self) -> int:
        """Bytes written so far."""
        return self._position

    def flush(self) -> None:
        """Do nothing: blocks reach the file when they are full and at :meth:`finish`."""

    def finish(self) -> str:
        """Write what is left, make it durable and return the sha256 of all bytes."""
        self._hand_over()
        self._wait()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        return self._digest.hexdigest() if self._digest else ""

    def close(self) -> None:
        """End the threads; the file stays open."""
        self._workers.shutdown()

    def _hand_over(self) -> None:
        self._wait()
        block = self._filling[: self._filled]
        self._underway = [self._workers.submit(self._put, block)]
        if self._digest:
            self._underway.append(self._workers.submit(self._digest.update, block))
        self._filling, self._other, self._filled = self._other, self._filling, 0

    def _wait(self) -> None:
        for part in self._underway:
            part.result()
        self._underway = []

    def _put(self, block: memoryview) -> None:
        self._raw.write(block)


def sha256(path: Path) -> str:
    """Digest of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    directory: Path, *, digests: Mapping[str, str] | None = None, tensors: Mapping[str, int] | None = None
) -> None:
    """Describe every file of the directory (not of directories in it).

    Args:
        directory: a directory in which nothing else will be written.
        digests: sha256 by file, where it is known already; the others are read.
        tensors: number of tensors in a file.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != MANIFEST:
            digest = (digests or {}).get(path.name) or sha256(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": digest}
            if path.name in (tensors or {}):
                files[path.name]["tensors"] = (tensors or {})[path.name]
    write_text(directory / MANIFEST, json.dumps({"format": 1, "files": files}, indent=2) + "\n")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Return the described files, None where the directory has no manifest."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_bytes())["files"]
        for name, entry in files.items():
            assert name == os.path.basename(name), name
            assert isinstance(entry["size"], int), name
            assert isinstance(entry["sha256"], str), name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise OISDError(f"{path} is damaged ({brief(error)}): delete it, or convert the model again") from None
    return dict(files)


def check_sizes(directory: Path, endings: tuple[str, ...] = ("",)) -> None:
    """Compare the sizes of the described files whose names end so with the manifest; nothing where there is none.

    Raises:
        OISDError: a file is missing or has another size.
    """
    for name, entry in (read_manifest(directory) or {}).items():
        path = directory / name
        if not name.endswith(endings):
            continue
        if not path.is_file():
            raise OISDError(f"{path} is missing, and {MANIFEST} lists it: convert or copy the model again")
        if path.stat().st_size != entry["size"]:
            raise OISDError(
                f"{path} has {path.stat().st_size} bytes, and {MANIFEST} says {entry['size']}: convert or copy the "
                f"model again, or delete {MANIFEST} if you have replaced the file"
            )


def check_manifest(directory: Path) -> int:
    """Compare every described file with its digest.

    Returns:
        The number of files; 0 where the directory has no manifest.

    Raises:
        OISDError: a file is missing or has changed.
    """
    check_sizes(directory)
    files = read_manifest(directory) or {}
    for name, entry in files.items():
        if sha256(directory / name) != entry["sha256"]:
            raise OISDError(
                f"{directory / name} is damaged or was changed: its sha256 is not the one in {MANIFEST}; convert or "
                f"copy the model again"
            )
    return len(files)
