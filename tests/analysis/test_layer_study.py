"""The numbers by layer against transformers' own hidden states and attentions, on HF and Megatron checkpoints.

What transformers computes in float32 is turned into policies, entropies and divergences in float64 by plain formulas.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_oisd.analysis import measures
from megatron_oisd.analysis.checkpoints import iterations, open_checkpoint
from megatron_oisd.analysis.layer_study import MEASURES, LayerStudy, Sample, read_study, study_layers
from megatron_oisd.analysis.streamed_model import StreamedModel
from megatron_oisd.errors import OISDError
from tests.helpers.checkpoints import TOKENS, VOCAB, make_hf_checkpoint

pytest.importorskip("transformers")
TOLERANCE = 1e-5
GENERATOR = torch.Generator().manual_seed(7)
SAMPLES = [
    Sample(id=f"s{n}", token_ids=torch.randint(TOKENS, (n,), generator=GENERATOR).tolist(), first_scored=first)
    for n, first in ((5, 1), (11, 4), (8, 7))
]


def policy(hidden: Tensor, head: Tensor) -> Tensor:
    return torch.softmax(hidden.double() @ head.double().T, dim=-1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    half = [torch.where(x > 0, x * (x / m).log(), 0.0).sum(-1) / 2 for x in (p, q)]
    return half[0] + half[1]


@torch.no_grad()
def expected(directory: Path, sample: Sample) -> dict[str, list[float]]:
    """Every measure of one sample, from ``output_hidden_states`` and ``output_attentions``, one prompt at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    inside: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    for seen, layer in zip(inside, model.model.layers, strict=True):
        # The norms' outputs are what the modules read; their inputs are the residual stream.
        layer.input_layernorm.register_forward_hook(lambda m, i, o, seen=seen: seen.update(attention_input=o))
        layer.post_attention_layernorm.register_forward_hook(
            lambda m, i, o, seen=seen: seen.update(after_attention=i[0], ffn_input=o)
        )
        layer.self_attn.o_proj.register_forward_hook(lambda m, i, o, seen=seen: seen.update(attention_output=o))
    output = model(torch.tensor([sample.token_ids]), output_hidden_states=True, output_attentions=True)
    scored = slice(sample.first_scored - 1, len(sample.token_ids) - 1)
    head, final = model.lm_head.weight, torch.softmax(output.logits[0, scored].double(), -1)
    # transformers' last hidden state is normed already; before the norm it is the one before plus what was added.
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for number, seen in enumerate(inside):
        last = number == len(inside) - 1
        after = output.hidden_states[number + 1][0, scored]
        before = model.model.norm(output.hidden_states[number][0, scored])
        own = policy(after if last else model.model.norm(after), head)
        values: dict[str, Tensor] = {
            "entropy/residual": entropy(own), "js/teacher": js(own, final),
            "entropy/layer_input": entropy(policy(before, head)),
            "entropy/after_attention": entropy(policy(model.model.norm(seen["after_attention"][0, scored]), head)),
        }  # fmt: skip
        for name in ("attention_input", "attention_output", "ffn_input"):
            values[f"entropy/{name}"] = entropy(policy(seen[name][0, scored], head))
        layer = model.model.layers[number]
        written = layer.mlp(seen["ffn_input"])
        written = written[0] if isinstance(written, tuple) else written
        values["entropy/ffn_output"] = entropy(policy(written[0, scored], head))
        mine, teacher = (a[0, :, scored].double() for a in (output.attentions[number], output.attentions[-1]))
        values["js/attention"] = js(mine, teacher).mean(0)
        for name, value in values.items():
            found[name].append(value.mean().item())
    return found


@pytest.fixture(scope="module")
def study_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a family's checkpoint and studies it, once each."""
    made: dict[str, tuple[Path, LayerStudy]] = {}

    def make(family: str, tied: bool) -> tuple[Path, LayerStudy]:
        if family not in made:
            directory = make_hf_checkpoint(tmp_path_factory.mktemp(family), tied=tied, family=family)
            made[family] = directory, study_layers(StreamedModel(open_checkpoint(directory)), SAMPLES, lens_sample=1)
        return made[family]

    return make


@pytest.mark.parametrize(
    ("family", "tied"), [("Qwen3", True), ("Llama", False), ("Mistral", False), ("Qwen3Moe", False)]
)
def test_measures_equal_those_of_transformers(family: str, tied: bool, study_of: Any) -> None:
    directory, study = study_of(family, tied)
    assert study.measures.keys() == MEASURES.keys()
    for row, sample in enumerate(SAMPLES):
        for name, values in expected(directory, sample).items():
            assert np.abs(study.measures[name][row] - values).max() < TOLERANCE, (name, sample.id)
    assert study.positions == [4, 7, 1]
    assert study.measures["js/teacher"][:, -1].max() < TOLERANCE
    assert study.measures["js/attention"][:, -1].max() == 0
    assert study.measures["js/teacher"][:, 0].min() > 1e-3


def test_lens_map_equals_that_of_transformers(study_of: Any) -> None:
    from transformers import AutoModelForCausalLM

    directory, study = study_of("Llama", False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sample, lens = SAMPLES[1], study.lens
    with torch.no_grad():
        hidden = model(torch.tensor([sample.token_ids]), output_hidden_states=True).hidden_states
        assert lens is not None
        assert lens.first_position == 3
        assert lens.tokens == [str(token) for token in sample.token_ids[3:-1]]
        assert lens.next_tokens == [str(token) for token in sample.token_ids[4:]]
        for layer in range(1, study.num_layers + 1):
            states = hidden[layer][0, 3:-1]
            own = policy(states if layer == study.num_layers else model.model.norm(states), model.lm_head.weight)
            best = own.max(-1)
            assert lens.top_tokens[layer - 1] == [str(token) for token in best.indices.tolist()]
            assert np.abs(np.array(lens.probabilities[layer - 1]) - best.values.numpy()).max() < TOLERANCE


@pytest.mark.parametrize(("family", "tied"), [("Qwen3", True), ("Llama", False)])
def test_megatron_checkpoints_give_the_same(family: str, tied: bool, study_of: Any, tmp_path: Path) -> None:
    from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore

    directory, study = study_of(family, tied)
    mcore = tmp_path / "mcore"
    with pytest.warns(UserWarning, match="no tokenizer files"):
        convert_hf_to_mcore(directory, mcore, verify="none", progress=False)
    assert iterations(mcore) == [0]
    # Not resident: every layer is read anew in both passes.
    model = StreamedModel(open_checkpoint(mcore), resident=False)
    other = study_layers(model, SAMPLES, lens_sample=1)
    assert all(parameter.is_meta for parameter in model._body.layers.parameters())
    assert (other.label, other.step) == ("step 0", 0)
    for name in MEASURES:
        assert np.abs(other.measures[name] - study.measures[name]).max() < TOLERANCE, name
    assert other.lens == study.lens
    assert open_checkpoint(mcore / "iter_0000000").step == 0


def test_batching_and_chunks_change_nothing(study_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, study = study_of("Llama", False)
    monkeypatch.setattr(measures, "CHUNK_ELEMENTS", 2 * VOCAB)
    most = 0
    original = measures.log_policy

    def watched(hidden: Tensor, unembedding: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(hidden))
        return original(hidden, unembedding)

    monkeypatch.setattr(measures, "log_policy", watched)
    other = study_layers(StreamedModel(open_checkpoint(directory)), SAMPLES, lens_sample=1, batch_tokens=1)
    assert most == 2  # rows of logits in memory at once
    for name in MEASURES:
        assert np.abs(other.measures[name] - study.measures[name]).max() < TOLERANCE, name


def test_a_study_is_written_and_read(study_of: Any, tmp_path: Path) -> None:
    _, study = study_of("Qwen3", True)
    study.write(tmp_path / "new" / "layers.json")
    again = read_study(tmp_path / "new" / "layers.json")
    assert dataclasses.replace(again, measures={}) == dataclasses.replace(study, measures={})
    for name in MEASURES:
        assert np.array_equal(again.measures[name], study.measures[name])
    (tmp_path / "x.json").write_text('{"measures": {}}')
    for wrong in ("absent.json", "x.json"):
        with pytest.raises(OISDError, match=r"not the layers\.json"):
            read_study(tmp_path / wrong)


def test_js_of_extreme_distributions() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert measures.js_of(one, other).item() == pytest.approx(math.log(2))
    assert measures.js_of(one, one).item() == 0
    certain = torch.log_softmax(torch.tensor([[1e4, 0.0, -1e4]]), -1)
    assert measures.entropy_of(certain).tolist() == [0]
    assert measures.entropy_of(torch.log_softmax(torch.zeros(1, 8), -1)).item() == pytest.approx(math.log(8))


def test_what_cannot_be_studied_is_refused(study_of: Any, tmp_path: Path) -> None:
    directory, _ = study_of("Llama", False)
    model = StreamedModel(open_checkpoint(directory))
    for samples, said in [
        ([], "no samples"),
        ([Sample(id="a", token_ids=[3])], "none to score"),
        ([Sample(id="a", token_ids=[3, VOCAB])], "outside"),
    ]:
        with pytest.raises(OISDError, match=said):
            study_layers(model, samples)
    with pytest.raises(OISDError, match="is no checkpoint"):
        open_checkpoint(tmp_path)
    with pytest.raises(OISDError, match="has no iterations"):
        open_checkpoint(directory, 3)
    with pytest.raises(OISDError, match="holds no Megatron checkpoint"):
        iterations(tmp_path)
