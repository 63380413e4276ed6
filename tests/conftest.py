"""Every test runs with one thread, so that results do not depend on the machine's core count."""

import os

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
