"""What the trainer's tests start from, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.training import make_workspace


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model as Megatron checkpoint, and arithmetic problems."""
    return make_workspace(tmp_path_factory.mktemp("trainer"))
