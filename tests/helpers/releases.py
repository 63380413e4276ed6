"""What older releases of Megatron-Core cannot do, with or without OISD."""

from __future__ import annotations

import megatron.core
import pytest
from packaging.version import Version

# What Megatron-Core itself cannot do, or does wrong, before a release: the first entry whose text begins a layout's
# name, or is among its options, counts. OISD has no part in any of them.
SINCE = (
    ("TP 4, more ranks than key heads", "0.16"),
    ("sliding windows", "0.15"),  # window_attn_skip_freq
    ("pipeline_model_parallel_layout", "0.13"),
    ("PP 4, VPP 2", "0.13"),  # by such a layout
    # The two ends of tied embeddings are cut into shards at different places.
    ("DP 2, PP 2, overlapped reduction, distributed optimizer, tied", "0.13"),
    # A bucket that is used out of order is gathered twice, which an assertion forbids.
    ("DP 2, PP 2, overlapped parameter gather", "0.11"),
    # Likewise in 0.10; in 0.12 the distributed optimizer asks for Transformer Engine.
    ("DP 2, PP 2, distributed optimizer, everything overlapped", "0.13"),
    # finalize_model_grads() does not sum the tokens over CP, nor does the schedule scale a mean loss by it: there loss
    # functions have to, and this harness's does not.
    ("CP 2, PP 2, mean loss", "0.12"),
    ("CP", "0.13"),
    ("MLA, packed THD", "0.13"),
    ("MLA", "0.11"),  # its rotary embedding has the wrong axes without packed sequences
    ("MTP", "0.12"),
    ("MoE", "0.12"),  # wants Transformer Engine, then experts as wide as dense layers
)


def skip_before(*names: str) -> None:
    """Skip a test of what the installed release cannot do; ``names``: the layout's, and its options'."""
    for text, release in SINCE:
        if any(name.startswith(text) for name in names):
            if Version(megatron.core.__version__) < Version(release):
                pytest.skip(f"Megatron-Core has this since {release}")
            return
