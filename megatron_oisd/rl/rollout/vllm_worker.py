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


def _forget_expert_kernels(model: Any) -> None:
    """Let vLLM pack experts for the CPU again when they are loaded again.

    It does so for the kernel's first weights only (seen in 0.32) and would then read unpacked ones as packed: wrong
    tokens without an error. GPUs' layouts are made anew by each load, and their captured graphs need the old kernel.
    """
    from vllm.platforms import current_platform

    for module in model.modules() if current_platform.is_cpu() else ():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


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
        _forget_expert_kernels(self.model_runner.model)
        # Not model.load_weights: what vLLM made of the weights after loading them must be made again.
        self.model_runner.reload_weights(weights_iterator=tensors)
        self._oisd_version = version
        return version

    def oisd_weights_version(self) -> str:
        """The version of the last whole refresh, empty for none."""
        return self._oisd_version
