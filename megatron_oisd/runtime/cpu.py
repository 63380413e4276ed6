"""Lets Megatron-Core run where there is no CUDA device: on CPU, over gloo.

Megatron-Core names the CUDA device in some two hundred places (``device="cuda"``, ``torch.cuda.current_device()``,
``.cuda()``, assertions on ``tensor.type()``). :func:`install` answers those calls with the CPU. It is for tests, for
converting checkpoints on a laptop and for trying things out; it is **never** active where CUDA is available, and no
code of this package needs it on a GPU machine.

Plain replacement of functions is used rather than a ``TorchFunctionMode``: a mode is inactive inside
``Tensor.backward``, so activation recomputation would escape it, and it taxes every tensor operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)

_installed: list[tuple[Any, str, Any]] = []


def is_needed() -> bool:
    """Whether this process has no CUDA device, so that Megatron-Core needs the shim."""
    return not torch.cuda.is_available()


def is_installed() -> bool:
    """Whether :func:`install` is in force in this process."""
    return bool(_installed)


def install() -> bool:
    """Route Megatron-Core's CUDA calls to the CPU; idempotent.

    Returns:
        True when the shim is in force, False when CUDA is available and nothing was touched.
    """
    if not is_needed():
        return False
    if _installed:
        return True
    # Before anything is replaced: the import fills torch.compile's tables, which must see the real functions.
    from megatron.core.tensor_parallel import random as megatron_random
    from torch.utils import _device

    # Likewise the cached table of the factories that `with torch.device("meta")` redirects: filled later it would miss
    # them all, and transformers' from_pretrained, which builds on "meta", would leave rotary buffers uninitialised.
    _device._device_constructors()

    for name in _FACTORIES:
        _replace(torch, name, _with_cpu_device(getattr(torch, name)))
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "to", _to(torch.Tensor.to))
    _replace(torch.Tensor, "type", _type(torch.Tensor.type))
    cpu = torch.device("cpu")
    for name, value in {
        "current_device": lambda: cpu,
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "set_device": _nothing(),
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "Stream": _Stream,
        "stream": _stream,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }.items():
        _replace(torch.cuda, name, value)
    for name in ("range_push", "range_pop", "mark"):
        _replace(torch.cuda.nvtx, name, _nothing())

    # Older releases ask torch.cuda for the state.
    _replace_if_there(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    _mend_modules()
    return True


def _mend_modules() -> None:
    """Modules of Megatron-Core that use names of Transformer Engine which they did not get, or expect a copy."""
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        _replace_if_there(multi_latent_attention, "HAVE_TE", False)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    _replace_if_there(token_dispatcher, "maybe_move_tensor_to_cpu", _as_if_moved)


def _as_if_moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron turns split sizes into numpy on their way from a GPU only, and gloo takes nothing else."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def uninstall() -> None:
    """Put back every function that :func:`install` replaced."""
    while _installed:
        owner, name, original = _installed.pop()
        setattr(owner, name, original)


def _replace(owner: Any, name: str, value: Any) -> None:
    _installed.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _replace_if_there(owner: Any, name: str, value: Any) -> None:
    """For what only some releases of Megatron-Core have."""
    if hasattr(owner, name):
        _replace(owner, name, value)


def _nothing() -> Callable[..., None]:
    """Return a new do-nothing function: torch.compile's tables refuse one object under several torch names."""
    return lambda *args, **kwargs: None


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _with_cpu_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # pinned for a copy to a GPU that is not there
        return function(*args, **kwargs)

    return wrapped


def _to(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(self, *args, **kwargs)

    return wrapped


def _type(function: Callable[..., Any]) -> Callable[..., Any]:
    """Answer ``tensor.type()`` with the CUDA name: Megatron's optimizers sort parameters by that string."""

    @functools.wraps(function)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return wrapped


class _Stream:
    """A CUDA stream where there is none: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = wait_stream = wait_event = lambda *args, **kwargs: None

    def record_event(self, event: Any = None) -> Any:
        return self if event is None else event


@contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield
