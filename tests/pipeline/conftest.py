"""Models in the test process itself, and what a fresh one does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_oisd.runtime import cpu, distributed
from tests.helpers.layout import Batch, make_batch
from tests.helpers.one_chunk import Gradients, Model, build


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A world of one rank in the test process itself."""
    shim_was_there = cpu.is_installed()
    distributed.initialize()
    yield
    distributed.shutdown()
    if not shim_was_there:
        cpu.uninstall()


@pytest.fixture
def model(world: None) -> Model:
    return build()


@pytest.fixture(scope="module")
def shared(world: None) -> Model:
    """For tests that only look or are refused."""
    return build()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch()


@pytest.fixture(scope="module")
def fresh(world: None, batch: Batch) -> Gradients:
    """Gradients of one step of an instance that has seen nothing else."""
    model = build()
    return model.train(model.attach(), batch)
