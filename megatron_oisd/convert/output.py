"""Output directories that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_oisd.convert.checkpoint import LATEST, replace_directory
from megatron_oisd.errors import OISDError


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
    work = target.with_name(f".{target.name}.incomplete")
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
