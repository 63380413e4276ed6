"""Output directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_oisd.errors import OISDError

INCOMPLETE = ".incomplete"
"""Ending of the hidden directories and files that are being written."""
LATEST = "latest_checkpointed_iteration.txt"
"""Megatron-LM's name of the file that names the newest iteration."""


@contextmanager
def new_directory(target: str | Path, *, inputs: Sequence[str | Path] = (), force: bool = False) -> Iterator[Path]:
    """Give a hidden directory to write to, which becomes ``target`` when the block ends without an error.

    Args:
        target: must not exist, or be an empty directory, or with ``force`` a checkpoint, which is then replaced.
        inputs: directories that the block reads; ``target`` may not be one of them, hold one or lie inside one.
        force: replace a checkpoint.

    Raises:
        OISDError: ``target`` is in the way or cannot be made.
    """
    target = check_target(target, inputs=inputs, force=force)
    work = target.with_name(f".{target.name}{INCOMPLETE}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise OISDError(f"output {target} cannot be written ({error.strerror}): choose another directory") from error
    try:
        yield work
        replace_directory(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_target(target: str | Path, *, inputs: Sequence[str | Path] = (), force: bool = False) -> Path:
    """Return the absolute path of an output that :func:`new_directory` would accept; :class:`OISDError` otherwise."""
    target = Path(target).absolute()
    for source in map(Path, inputs):
        one, other = source.resolve(), target.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise OISDError(f"output {target} and input {source} overlap: choose another output directory")
    if target.exists():
        if not target.is_dir():
            raise OISDError(f"output {target} is a file: choose another output directory")
        if any(target.iterdir()):
            # A slip of the pen after --force must not delete a home directory.
            checkpoint = any((target / name).is_file() for name in (LATEST, "config.json"))
            if not (force and checkpoint):
                cure = "give --force to replace it" if checkpoint else "it is no checkpoint, choose another directory"
                raise OISDError(f"output {target} exists and is not empty: {cure}")
    return target


def replace_directory(work: Path, target: Path) -> None:
    """Rename ``work`` to ``target``, moving an existing ``target`` out of the way first and deleting it last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(work, target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file that is either old or new, never partial, also after a crash."""
    work = path.with_name(f".{path.name}{INCOMPLETE}")
    with open(work, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(work, path)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable, so that a rename cannot reach the disk before what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def brief(error: BaseException) -> str:
    """First line of an error's message, with its type where the message alone says little."""
    # Torch wraps what the ranks raised; the wrapper's own text is a multi-line dump.
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text[:200]}"
