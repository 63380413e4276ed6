"""Which layer to teach: BuPO's boundary layer, with how sure the samples are of it.

BuPO (arXiv 2512.19673, section 5.3) finds, on four models, that the best layer to train is the last one whose FFN still
widens the policy: the entropy of what the FFN writes is above that of what it reads. The OISD paper uses the layers
found so (Qwen3-4B/8B 6, OctoThinker-3B 27, -8B 31). It is a regularity of four models, not a law.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_oisd.analysis.layer_study import LayerStudy
from megatron_oisd.errors import OISDError

RESAMPLES = 2000
Rule = Literal["module", "lens"]
RULES: dict[str, tuple[str, str, str]] = {
    "module": ("entropy/ffn_output", "entropy/ffn_input", "what the FFN writes against what it reads, as in BuPO"),
    "lens": (
        "entropy/residual", "entropy/after_attention",
        "the residual stream after the FFN against before it, through the final norm, as OISD's student is read",
    ),
}  # fmt: skip
"""The two measures whose difference is the FFN's entropy change, and what that is."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A layer, 1-based, and what speaks for and against it."""

    layer: int | None
    """None where no layer below the last has a positive change."""
    rule: str
    threshold: float
    change: NDArray[np.float64]
    """``[layers]``, mean FFN entropy change in nats."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    """95% intervals of the mean, bootstrap over samples."""
    shares: dict[int | None, float]
    """How often each layer is chosen when the samples are drawn again, most frequent first."""
    samples: int
    firm_layer: int | None
    """The last layer whose whole interval lies above the threshold."""
    runs_of_positive: list[tuple[int, int]]
    """First and last layer of each stretch with a change above the threshold."""

    @property
    def certainty(self) -> float:
        """Share of redrawn sets of samples that choose the same layer."""
        return self.shares.get(self.layer, 0.0)

    def lines(self) -> list[str]:
        """The recommendation in words; the first line is the flag."""
        what = f"entropy change of {RULES[self.rule][2]}, mean over {self.samples} samples"
        if self.layer is None:
            best = int(np.argmax(self.change[:-1]))
            return [
                "no layer is recommended",
                f"based on: {what}; no layer below the last has a change above {self.threshold:g} nats, the largest is "
                f"{self.change[best]:+.4f} at layer {best + 1}",
                "what to do: compare the layers' figures, or try several layers in short runs",
            ]
        at = self.layer - 1
        lines = [
            f"--oisd-layers {self.layer}",
            f"based on: the last layer below the top with a positive FFN entropy change (above {self.threshold:g} "
            f"nats); rule {self.rule!r}: {what}",
            f"at layer {self.layer}: {self.change[at]:+.4f} nats, 95% interval {self.low[at]:+.4f} to "
            f"{self.high[at]:+.4f} over samples",
        ]
        if self.samples == 1:
            lines.append("uncertainty: unknown from one sample; give several (--data, --limit)")
        else:
            shares = ", ".join(
                f"{'none' if layer is None else f'layer {layer}'} {100 * share:.0f}%"
                for layer, share in list(self.shares.items())[:4]
            )
            lines.append(f"uncertainty: of {RESAMPLES} redraws of the samples, {shares}")
        if self.low[at] <= self.threshold:
            lines.append(
                f"weak: the interval at layer {self.layer} reaches {self.threshold:g}; more samples may move it"
            )
        if self.samples > 1 and self.firm_layer not in (None, self.layer):
            lines.append(
                f"other candidate: --oisd-layers {self.firm_layer}, the last layer whose whole interval lies above "
                f"{self.threshold:g}; take it where the changes after it are about nothing"
            )
        if len(self.runs_of_positive) > 1:
            stretches = ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in self.runs_of_positive)
            lines.append(
                f"ambiguous: the change is positive in several stretches of layers ({stretches}); the rule takes the "
                f"last, and a small --threshold may leave only the first"
            )
        lines.append("the rule comes from four models of 3B to 8B; check it with a short run on yours")
        return lines


def recommend(study: LayerStudy, *, rule: str = "module", threshold: float = 0.0, seed: int = 0) -> Recommendation:
    """Apply the rule to a study.

    Args:
        study: from :func:`megatron_oisd.analysis.layer_study.study_layers`.
        rule: a key of :data:`RULES`.
        threshold: changes up to this many nats count as none.
        seed: of the bootstrap over samples.

    Raises:
        OISDError: an unknown rule, or a model with a single layer.
    """
    if rule not in RULES:
        raise OISDError(f"--rule {rule!r}: expected one of {', '.join(RULES)}")
    if study.num_layers < 2:
        raise OISDError("the model has one layer, which is the teacher: there is none to recommend")
    after, before, _ = RULES[rule]
    change = study.measures[after] - study.measures[before]
    count = len(change)
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    means = change[draws].mean(axis=1)
    chosen = Counter(_last_positive(row, threshold) for row in means)
    mean = change.mean(axis=0)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return Recommendation(
        layer=_last_positive(mean, threshold), rule=rule, threshold=threshold, change=mean, low=low, high=high,
        shares={layer: number / RESAMPLES for layer, number in chosen.most_common()}, samples=count,
        firm_layer=_last_positive(low, threshold),
        runs_of_positive=_stretches(mean[:-1] > threshold),
    )  # fmt: skip


def _last_positive(change: NDArray[np.float64], threshold: float) -> int | None:
    """The last layer, 1-based and below the top, with a change above the threshold."""
    found = np.flatnonzero(change[:-1] > threshold)
    return int(found[-1]) + 1 if len(found) else None


def _stretches(positive: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], positive, [False]]).astype(int)))
    return [(int(a) + 1, int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
