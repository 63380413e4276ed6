"""Counts the floating-point operations of whatever runs inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class OperationCounter(TorchDispatchMode):
    """Operations of matrix products and attention by PyTorch's own formulas, backward included: ``total``.

    PyTorch's ``FlopCounterMode`` hooks modules, which the gradient within a tap's backward forbids. Operations of
    fused kernels that PyTorch knows no formula for (Transformer Engine, Triton) are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket
        if packet not in flop_registry:
            with self:  # in inference mode a linear layer comes whole, and its product is inside
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.total += flop_registry[packet](*args, **kwargs, out_val=result)
        return result
