"""megatron_oisd: On-Policy Internal Self-Distillation (OISD) for RL post-training on Megatron-Core.

Public surface: :class:`OISDConfig`, the frozen configuration, and :class:`OISD`, which attaches it to somebody's
Megatron model chunks. The losses in :mod:`megatron_oisd.losses` import no Megatron and can be used on their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError

if TYPE_CHECKING:
    from megatron_oisd.pipeline.oisd import OISD

__version__ = "0.1.0"
__all__ = ["OISD", "OISDConfig", "OISDError", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: importing the package for its losses must not import Megatron-Core.
    if name == "OISD":
        from megatron_oisd.pipeline.oisd import OISD

        return OISD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
