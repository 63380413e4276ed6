"""The recommender: BuPO's rule on made-up entropies, its uncertainty, and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_oisd.analysis.layer_study import MEASURES, LayerStudy
from megatron_oisd.analysis.recommend import RULES, recommend
from megatron_oisd.errors import OISDError


def study(change: list[list[float]], rule: str = "module") -> LayerStudy:
    """A study whose FFN entropy change is ``change[sample][layer]``."""
    values = np.array(change)
    measures = {name: np.ones_like(values) for name in MEASURES}
    measures[RULES[rule][0]] = measures[RULES[rule][1]] + values
    count, layers = values.shape
    return LayerStudy(
        label="m", step=None, architecture="Qwen3ForCausalLM", num_layers=layers, vocab_size=100,
        samples=[str(i) for i in range(count)], positions=[5] * count, response_only=True, measures=measures,
    )  # fmt: skip


@pytest.mark.parametrize("rule", list(RULES))
def test_last_layer_with_positive_change(rule: str) -> None:
    found = recommend(study([[0.5, 0.4, 0.3, -0.1, -0.2, 0.9]] * 3, rule), rule=rule)
    assert found.layer == 3  # the top layer is the teacher and is never chosen
    assert found.certainty == 1
    lines = found.lines()
    assert lines[0] == "--oisd-layers 3"
    assert "100%" in "\n".join(lines)
    assert not any(line.startswith(("weak", "ambiguous")) for line in lines)


def test_positive_up_to_the_top_gives_the_last_but_one() -> None:
    assert recommend(study([[0.1] * 28] * 2)).layer == 27


def test_uncertainty_over_samples() -> None:
    found = recommend(study([[1.0, 1.0, -1.0], [1.0, -1.02, -1.0]] * 2))
    assert found.layer == 1  # the mean at layer 2 is just below 0
    assert 0.2 < found.shares[2] < 0.5
    assert found.shares[1] + found.shares[2] == pytest.approx(1)
    assert found.low[1] < 0 < found.high[1]
    text = "\n".join(recommend(study([[1.0, 1.02, -1.0], [1.0, -1.0, -1.0]] * 2)).lines())
    assert "--oisd-layers 2" in text
    assert "weak: the interval at layer 2" in text
    assert "other candidate: --oisd-layers 1," in text


def test_several_stretches_are_said() -> None:
    found = recommend(study([[0.5, -0.2, 0.01, 0.01, -1.0]] * 2))
    assert found.runs_of_positive == [(1, 1), (3, 4)]
    assert "(1, 3-4)" in "\n".join(found.lines())
    assert recommend(study([[0.5, -0.2, 0.01, 0.01, -1.0]] * 2), threshold=0.05).layer == 1


def test_one_sample_says_that_nothing_is_known() -> None:
    assert "unknown from one sample" in "\n".join(recommend(study([[0.5, -0.2]])).lines())


def test_nothing_positive() -> None:
    found = recommend(study([[-0.5, -0.2, 0.3]] * 2))
    assert found.layer is None
    assert found.lines()[0] == "no layer is recommended"
    assert "-0.2000 at layer 2" in found.lines()[1]


@pytest.mark.parametrize(("kwargs", "said"), [({"rule": "x"}, "--rule 'x'"), ({}, "one layer")])
def test_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(OISDError, match=said):
        recommend(study([[0.5]]), **kwargs)
