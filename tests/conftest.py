"""Every test runs with one thread, so that results do not depend on the machine's core count."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpus(n)`` where the machine has fewer."""
    available = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpus")
        if marker and marker.args[0] > available:
            item.add_marker(pytest.mark.skip(reason=f"needs {marker.args[0]} GPUs, {available} here"))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model as Megatron checkpoint, and arithmetic problems: what runs of the trainer start from."""
    from tests.helpers.training import make_workspace

    return make_workspace(tmp_path_factory.mktemp("trainer"))
