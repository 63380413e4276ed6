"""Gradients of the losses against each other, by layer: norms, cosines, and how both go over training."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.analysis.plotting import COLOURS, NEUTRAL, save_figure

PAIRS = (("grpo", "oisd"), ("grpo", "think"), ("grpo", "attn"), ("think", "attn"))


def compare_gradients(parts: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Compare the gradients of several losses.

    Args:
        parts: ``grpo``, ``think``, ``attn`` and ``oisd``; each the gradient of every parameter under Megatron's names.

    Returns:
        A row for each layer (counted from 1), the embedding, the head (final norm and unembedding) and all parameters:
        ``group``, ``norm_<part>``, and ``cos_<part>_<part>``, None where a gradient is zero.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for name in parts["grpo"]:
        found = re.search(r"\.layers\.(\d+)\.", name)
        group = f"layer {int(found[1]) + 1}" if found else "embedding" if "embedding" in name else "head"
        names[group].append(name)
        names["all"].append(name)
    rows = []
    for group, members in names.items():
        flat = {part: torch.cat([found[name].flatten() for name in members]) for part, found in parts.items()}
        row: dict[str, Any] = {"group": group} | {f"norm_{part}": value.norm().item() for part, value in flat.items()}
        for one, other in PAIRS:
            norms = flat[one].norm() * flat[other].norm()
            row[f"cos_{one}_{other}"] = (flat[one] @ flat[other] / norms).item() if norms else None
        rows.append(row)
    return rows


def draw_gradients(rows: Sequence[Mapping[str, Any]], output: str | Path) -> list[Path]:
    """Draw how large OISD's gradient is beside GRPO's and where it points, over training.

    Args:
        rows: of :func:`compare_gradients`, each with its ``step``; several of a step (seeds) are averaged.
        output: where; an ending ``.png`` or ``.svg`` is left off, as both are written.

    Returns:
        The PNG and the SVG.

    Raises:
        OISDError: matplotlib is missing, or the files cannot be written.
    """
    groups = [group for group in dict.fromkeys(row["group"] for row in rows) if group != "all"]
    groups = [g for g in groups if any(row["norm_oisd"] and row["norm_grpo"] for row in rows if row["group"] == g)]

    def fill(figure: Any) -> None:
        panels = figure.subplots(1, 3)
        for colour, group in zip(COLOURS, groups, strict=False):
            own = [row for row in rows if row["group"] == group and row["norm_grpo"]]
            steps = sorted({row["step"] for row in own})
            at = [[row for row in own if row["step"] == step] for step in steps]
            ratio = [sum(row["norm_oisd"] / row["norm_grpo"] for row in found) / len(found) for found in at]
            panels[0].plot(steps, ratio, color=colour, marker="o", markersize=2.5, linewidth=1.1, label=group)
            for panel, part in zip(panels[1:], ("think", "attn"), strict=True):
                name = f"cos_grpo_{part}"
                values = [[row[name] for row in found if row[name] is not None] for found in at]
                if all(values):
                    means = [sum(found) / len(found) for found in values]
                    panel.plot(steps, means, color=colour, marker="o", markersize=2.5, linewidth=1.1)
        panels[0].set_yscale("log")
        panels[0].axhline(1.0, color=NEUTRAL, linewidth=0.8)
        panels[0].set_title("Norm: OISD / GRPO")
        for panel, part in zip(panels[1:], ("logit", "attention"), strict=True):
            panel.set_title(f"Cosine to GRPO's: {part}")
            panel.axhline(0.0, color=NEUTRAL, linewidth=0.8)
        for panel in panels:
            panel.set_xlabel("training step")
        if groups:
            figure.legend(loc="outside lower center", ncols=len(groups), frameon=False)

    return save_figure(fill, output, (7.2, 2.8))
