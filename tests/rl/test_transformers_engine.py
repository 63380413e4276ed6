"""The transformers engine against direct forwards of the same tiny random model."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from megatron_oisd.convert.hf_files import SafetensorsDirectory
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import INCONSISTENT_VERSION, Rollout, SamplingParams
from megatron_oisd.rl.rollout.transformers_engine import TransformersEngine
from tests.helpers.checkpoints import make_hf_checkpoint

EOS, PAD, VOCABULARY = 2, 0, 24
PROMPTS = [[5, 6, 7, 8, 9, 10], [3], [11, 12, 13], [4, 4, 4, 4]]


def make_model(seed: int = 0, tied: bool = False) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # peaked enough that a wrong position or mask shows
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).float().eval()


def make_engine(seed: int = 0, tied: bool = False, batch_size: int = 256) -> TransformersEngine:
    return TransformersEngine(make_model(seed, tied), eos_token_id=EOS, pad_token_id=PAD, batch_size=batch_size)


def assert_same(actual: list[list[Rollout]], expected: list[list[Rollout]]) -> None:
    """Same tokens; log-probabilities but for the last bit, which follows the alignment of the weights in memory."""
    for mine, theirs in zip(chain(*actual), chain(*expected), strict=True):
        assert mine.response_ids == theirs.response_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def forward_logits(model: Qwen3ForCausalLM, rollout: Rollout) -> torch.Tensor:
    """Logits of each response token from one unpadded forward, ``[T, V]``."""
    tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with torch.no_grad():
        return model(input_ids=tokens).logits[0, len(rollout.prompt_ids) - 1 : -1].double()


@pytest.mark.parametrize("batch_size", [256, 3])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_logprobs_equal_a_direct_forward(temperature: float, top_p: float, batch_size: int) -> None:
    engine = make_engine(batch_size=batch_size)
    sampling = SamplingParams(max_new_tokens=12, temperature=temperature, top_p=top_p)
    results = engine.generate(PROMPTS, sampling, samples_per_prompt=3, seeds=[5] * 4)
    assert [len(group) for group in results] == [3] * len(PROMPTS)
    model = make_model()
    for prompt, group in zip(PROMPTS, results, strict=True):
        for rollout in group:
            assert rollout.prompt_ids == prompt
            expected = (forward_logits(model, rollout) / temperature).log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs).double(), chosen, rtol=0, atol=2e-5)


def test_sampling_follows_the_distribution() -> None:
    engine = make_engine()
    (group,) = engine.generate([[5, 6]], SamplingParams(max_new_tokens=1), samples_per_prompt=4000, seeds=[0])
    counts = torch.bincount(torch.tensor([rollout.response_ids[0] for rollout in group]), minlength=VOCABULARY)
    expected = forward_logits(make_model(), group[0])[0].softmax(-1)
    assert (counts / 4000 - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_greedy_takes_the_largest_logit() -> None:
    (group,) = make_engine().generate([PROMPTS[0]], SamplingParams(max_new_tokens=8, temperature=0), seeds=[0])
    logits = forward_logits(make_model(), group[0])
    assert logits.argmax(-1).tolist() == group[0].response_ids


def test_same_seed_same_rollouts_other_seed_others() -> None:
    sampling = SamplingParams(max_new_tokens=10)
    engine = make_engine()
    first, again, other = (engine.generate(PROMPTS, sampling, samples_per_prompt=2, seeds=[s] * 4) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0][0].response_ids != first[0][1].response_ids or first[2][0] != first[2][1]


def test_the_callers_random_state_is_untouched() -> None:
    engine = make_engine()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=4), seeds=[9] * 4)
    assert torch.equal(before, torch.get_rng_state())


def test_the_checkpoints_generation_config_changes_nothing() -> None:
    sampling = SamplingParams(max_new_tokens=10)
    model = make_model()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, min_p=0.5, temperature=0.1, repetition_penalty=3.0, eos_token_id=7, bad_words_ids=[[9]]
    )
    strange = TransformersEngine(model, eos_token_id=EOS, pad_token_id=PAD)
    assert_same(
        strange.generate(PROMPTS, sampling, seeds=[1] * 4), make_engine().generate(PROMPTS, sampling, seeds=[1] * 4)
    )


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_responses_end_with_the_first_end_token(pad: int) -> None:
    engine = TransformersEngine(make_model(), eos_token_id=[EOS, 9], pad_token_id=pad)
    groups = engine.generate(PROMPTS, SamplingParams(max_new_tokens=20), samples_per_prompt=30, seeds=[0] * 4)
    rollouts = [rollout for group in groups for rollout in group]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ends = [token in (EOS, 9) for token in rollout.response_ids]
        assert not any(ends[:-1])
        assert ends[-1] == (rollout.finish_reason == "stop")
        assert ends[-1] or len(rollout.response_ids) == 20
        assert len(rollout.logprobs) == len(rollout.response_ids)


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[3], []], SamplingParams(max_new_tokens=4), "prompt 1 is empty"),
        ([[3, VOCABULARY]], SamplingParams(max_new_tokens=4), "vocabulary"),
        ([[3] * 61], SamplingParams(max_new_tokens=4), "64 positions"),
    ],
)
def test_unusable_requests_are_refused(prompts: list[list[int]], sampling: SamplingParams, message: str) -> None:
    with pytest.raises(OISDError, match=message):
        make_engine().generate(prompts, sampling, seeds=[0] * len(prompts))


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}]
)
def test_sampling_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(OISDError, match=f"{next(iter(values))}="):
        SamplingParams(**({"max_new_tokens": 4} | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_a_response_depends_on_its_own_seed_alone(top_p: float) -> None:
    sampling = SamplingParams(max_new_tokens=12, top_p=top_p)
    together = make_engine().generate(PROMPTS, sampling, samples_per_prompt=3, seeds=[11, 12, 13, 14])
    for index, seed in enumerate((11, 12, 13, 14)):
        alone = make_engine(batch_size=2).generate([PROMPTS[index]], sampling, samples_per_prompt=3, seeds=[seed])
        assert_same(alone, [together[index]])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    engine, model = make_engine(), make_model()
    sampling = SamplingParams(max_new_tokens=1, top_p=0.5)
    (group,) = engine.generate([[5, 6]], sampling, samples_per_prompt=2000, seeds=[0])
    p = forward_logits(model, group[0])[0].softmax(-1)
    order = p.argsort(descending=True)
    kept = int((p[order].cumsum(0) < 0.5).sum()) + 1
    drawn = torch.bincount(torch.tensor([rollout.response_ids[0] for rollout in group]), minlength=VOCABULARY) / 2000
    assert set(drawn.nonzero().flatten().tolist()) == set(order[:kept].tolist())
    expected = torch.zeros_like(p).index_copy_(0, order[:kept], p[order[:kept]] / p[order[:kept]].sum())
    assert (drawn - expected).abs().max() < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_refreshed_engine_samples_like_a_new_one(tied: bool, with_head: bool) -> None:
    weights = dict(make_model(seed=1, tied=tied).state_dict())
    head = weights.pop("lm_head.weight")
    if with_head or not tied:
        weights = {"lm_head.weight": head, **weights}
    engine = make_engine(seed=0, tied=tied)
    engine.update_weights(((name, tensor.clone()) for name, tensor in weights.items()), version=7)
    assert engine.weights_version == 7
    sampling = SamplingParams(max_new_tokens=10)
    expected = make_engine(seed=1, tied=tied).generate(PROMPTS, sampling, seeds=[4] * 4)
    assert_same(engine.generate(PROMPTS, sampling, seeds=[4] * 4), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: [*weights, ("model.norm.bias", torch.zeros(3))], r"'model\.norm\.bias' is unknown"),
        (lambda weights: [pair for pair in weights if pair[0] != "model.norm.weight"], r"first 'model\.norm\.weight'"),
        (lambda weights: [*weights, weights[3]], "came twice"),
        (lambda weights: [(name, tensor[:1]) for name, tensor in weights], r"'model\.embed_tokens\.weight' has shape"),
        (
            lambda weights: [*weights[:-1], (weights[-1][0], weights[-1][1] + 1)],
            "are tied in the rollout model but differ",
        ),
    ],
)
def test_bad_refreshes_are_named_and_void_the_version(change, message: str) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(tied=True)
    weights = list(make_model(seed=1, tied=True).state_dict().items())
    assert weights[-1][0] == "lm_head.weight"
    with pytest.raises(OISDError, match=message):
        engine.update_weights(change(weights), version=3)
    assert engine.weights_version == INCONSISTENT_VERSION


def test_experts_are_streamed_one_by_one(tmp_path: Path) -> None:
    """transformers holds them fused in memory; what a router is asked for in training must not disturb sampling."""
    from transformers import AutoModelForCausalLM

    def engine(name: str, seed: float) -> TransformersEngine:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(seed)
        return TransformersEngine(model, eos_token_id=EOS, pad_token_id=PAD)

    for name, split in (("split", True), ("fused", False)):
        make_hf_checkpoint(
            tmp_path / name, tied=False, family="Qwen3Moe", split_experts=split, mlp_only_layers=[2],
            output_router_logits=True,
        )  # fmt: skip
    weights = dict(SafetensorsDirectory(tmp_path / "split"))
    assert any(".experts.3.up_proj." in name for name in weights)
    other, sampling = engine("split", 0.7), SamplingParams(max_new_tokens=10)
    expected = engine("split", 1.0).generate(PROMPTS, sampling, seeds=[4] * 4)
    assert other.generate(PROMPTS, sampling, seeds=[4] * 4) != expected
    other.update_weights(iter(weights.items()), version=7)
    assert_same(other.generate(PROMPTS, sampling, seeds=[4] * 4), expected)
    missing = "model.layers.1.mlp.experts.2.down_proj.weight"
    with pytest.raises(OISDError, match=rf"1 weights missing from the refresh, first '{missing}'"):
        other.update_weights(((name, weights[name]) for name in weights if name != missing), version=8)
    with pytest.raises(OISDError, match=r"experts\.(down|gate_up)_proj' is unknown"):
        other.update_weights(iter(dict(SafetensorsDirectory(tmp_path / "fused")).items()), version=9)


def test_from_pretrained_round_trip(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    sampling = SamplingParams(max_new_tokens=8)
    loaded = TransformersEngine.from_pretrained(tmp_path)
    assert_same(
        loaded.generate(PROMPTS, sampling, seeds=[1] * 4), make_engine().generate(PROMPTS, sampling, seeds=[1] * 4)
    )


def test_unreadable_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OISDError, match=r"config\.json"):
        TransformersEngine.from_pretrained(tmp_path / "nowhere")
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(OISDError, match="cannot be read"):
        TransformersEngine.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OISDError, match="safetensors"):
        TransformersEngine.from_pretrained(tmp_path)


def test_a_checkpoint_without_one_tensor_is_refused(tmp_path: Path) -> None:
    model = make_model()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(OISDError, match=r"model\.norm\.weight"):
        TransformersEngine.from_pretrained(tmp_path)


def test_a_closed_engine_says_so() -> None:
    engine = make_engine()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=4), seeds=[0] * 4)


def test_a_woken_engine_samples_only_after_an_update() -> None:
    engine, sampling = make_engine(), SamplingParams(max_new_tokens=8)
    expected = engine.generate(PROMPTS, sampling, seeds=[1] * 4)
    weights = {name: tensor.clone() for name, tensor in make_model().state_dict().items()}
    engine.sleep()
    assert engine.weights_version == INCONSISTENT_VERSION
    engine.wake()
    assert engine.weights_version == INCONSISTENT_VERSION
    engine.update_weights(iter(weights.items()), version=3)
    assert engine.weights_version == 3
    assert_same(engine.generate(PROMPTS, sampling, seeds=[1] * 4), expected)
