"""mbridge (PyPI) as an outside oracle: from the same HF checkpoint it must make the same Megatron parameters.

mbridge is written for Transformer Engine. What it is given here is a model of Megatron's local spec whose parameters
have been moved to the places they have in Transformer Engine's modules, so that it runs on a CPU. Only weights are
compared: of the forward pass it knows less (Llama 3's rotary scaling, sliding windows and experts without normalised
weights are not in it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.convert.families import arguments_from_hf_config
from megatron_oisd.convert.hf_files import SafetensorsDirectory, read_hf_config
from megatron_oisd.convert.weights import load_hf_weights
from tests.helpers.checkpoints import build_chunks, make_hf_checkpoint, rename_as_transformer_engine
from tests.helpers.ranks import run_ranks

pytest.importorskip("mbridge")


def _compare(directory: Path, layout: dict[str, Any]) -> list[str]:
    """Names of parameters that differ on this rank, after checking that there are some."""
    from mbridge import AutoBridge

    arguments = arguments_from_hf_config(read_hf_config(directory))
    models = []
    for _ in range(2):
        models.append(build_chunks(arguments, **{"tp": 1, "pp": 1, **layout}))
        for chunk in models[-1]:
            rename_as_transformer_engine(chunk)
    ours, theirs = models
    load_hf_weights(ours, arguments, dict(SafetensorsDirectory(directory)))
    rows = arguments.padded_vocab_size(layout.get("tp", 1))
    bridge = AutoBridge.from_pretrained(str(directory), dtype=torch.float32, make_vocab_size_divisible_by=rows)
    # mbridge sets these when it builds the model itself.
    bridge.vocab_size, bridge.padded_vocab_size = arguments.vocab_size, rows
    with torch.no_grad():
        bridge.load_weights(theirs, str(directory))
    wrong, count = [], 0
    for mine, other in zip(ours, theirs, strict=True):
        expected = dict(other.named_parameters())
        for name, parameter in mine.named_parameters():
            count += 1
            if not torch.equal(parameter, expected[name]):
                wrong.append(name)
    assert count > 10
    return wrong


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("Qwen3", {"tp": 2}),
        ("Qwen2", {"tp": 2}),
        ("Qwen2", {"pp": 2}),
        ("Llama", {"tp": 2}),
        ("Qwen3Moe", {}),
        ("Qwen3Moe", {"ep": 2}),
    ],
)
def test_same_parameters_as_mbridge(family: str, layout: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    directory = make_hf_checkpoint(tmp_path, tied=tied, family=family)
    world = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("ep", 1)
    for rank, wrong in enumerate(run_ranks(world, _compare, directory, layout)):
        assert wrong == [], f"rank {rank}"
