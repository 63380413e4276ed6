"""What runs inside vLLM's worker processes: taking new weights in and telling their version.

vLLM mixes :class:`WorkerExtension` into its worker class (``worker_extension_cls``) and lets the outside call its
methods by ``collective_rpc``, with strings only when that goes over HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from megatron_oisd.rl.rollout.weight_stream import receive_weights

EXTENSION = "megatron_oisd.rl.rollout.vllm_worker.WorkerExtension"


class WorkerExtension:
    """Methods added to a vLLM worker."""

    model_runner: Any
    _oisd_version = ""

    def oisd_receive_weights(self, address: str, version: str) -> str:
        """Replace all weights by those that a trainer sends (see :mod:`.weight_stream`); returns the version."""
        return self.oisd_load_weights(receive_weights(address), version)

    def oisd_load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: str) -> str:
        """The same from an iterator, for an engine in the trainer's process."""
        self._oisd_version = ""  # a refresh that breaks off leaves no version
        # Not model.load_weights: what vLLM made of the weights after loading them must be made again.
        self.model_runner.reload_weights(weights_iterator=tensors)
        self._oisd_version = version
        return version

    def oisd_weights_version(self) -> str:
        """The version of the last whole refresh, empty for none."""
        return self._oisd_version
