"""Converted checkpoints in Megatron-LM's own hands: ``--load``, ``--pretrained-checkpoint``, ``--use-checkpoint-args``.

Megatron-LM's builder makes the model, its ``load_checkpoint`` fills it, at layouts that the checkpoint was not written
with; logits are compared with HF's. It does not prove the same with Transformer Engine, whose layers need a GPU; what
its norms ask of a checkpoint is imitated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore
from tests.helpers.checkpoints import TOKENS, VOCAB, make_hf_checkpoint
from tests.helpers.megatron_lm import ON_CPU, call, why_not_run
from tests.helpers.megatron_lm_load import load_and_run
from tests.helpers.ranks import run_ranks

SHAPE = [
    "--num-layers",
    "4",
    "--hidden-size",
    "64",
    "--ffn-hidden-size",
    "96",
    "--num-attention-heads",
    "4",
    "--group-query-attention",
    "--num-query-groups",
    "2",
    "--kv-channels",
    "32",
    "--max-position-embeddings",
    "128",
    "--normalization",
    "RMSNorm",
    "--position-embedding-type",
    "rope",
    "--rotary-base",
    "20000",
    "--swiglu",
    "--disable-bias-linear",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
]
"""The shape of the tiny models, as a user without ``--use-checkpoint-args`` writes it."""

ALWAYS = [
    "--seq-length",
    "16",
    "--micro-batch-size",
    "1",
    "--train-iters",
    "1",
    "--lr",
    "1e-3",
    "--norm-epsilon",
    "1e-6",
    "--tokenizer-type",
]
"""What a checkpoint does not bring along."""

FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Qwen3": ({}, ["--qk-layernorm"]),
    "Llama": (
        # The only factor that Megatron-LM's gpt_builder gives its model.
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 20000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }},
        ["--use-rope-scaling"],
    ),
}  # fmt: skip
"""Fields of the HF configuration, and what Megatron-LM is told beyond the shape."""

REPORTED = [
    "num_layers",
    "num_query_groups",
    "kv_channels",
    "rotary_base",
    "swiglu",
    "normalization",
    "add_bias_linear",
]
REPORTED += ["untie_embeddings_and_output_weights", "position_embedding_type", "padded_vocab_size", "finetune"]


@pytest.fixture(scope="module", autouse=True)
def _can_run() -> None:
    if why_not_run():
        pytest.skip(why_not_run())


def _convert(source: Path, target: Path) -> None:
    convert_hf_to_mcore(source, target, verify="none", progress=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[Path, Path]]:
    """(HF, Megatron) directories by (family, tied)."""
    found = {}
    for family, tied in (("Qwen3", True), ("Qwen3", False), ("Llama", False)):
        folder = tmp_path_factory.mktemp(f"{family}-{tied}")
        hf = make_hf_checkpoint(
            folder / "hf", tied=tied, family=family, tokenizer=True, rms_norm_eps=1e-6, **FAMILIES[family][0]
        )
        run_ranks(1, _convert, hf, folder / "mcore")
        found[family, tied] = hf, folder / "mcore"
    return found


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, TOKENS, (1, 16), generator=torch.Generator().manual_seed(1))


def _hf_logits(directory: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens).logits


def _arguments(mcore: Path, family: str, *, tp: int, pp: int, tied: bool, shape: list[str]) -> list[str]:
    untied = [] if tied or not shape else ["--untie-embeddings-and-output-weights"]
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    own = [*ALWAYS, "HuggingFaceTokenizer", "--tokenizer-model", str(mcore / "hf"), *FAMILIES[family][1]]
    return [*shape, *untied, *ON_CPU, *own, *sizes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied", "tp", "pp", "how"),
    [
        ("Qwen3", True, 1, 2, "--load"),
        ("Qwen3", False, 1, 1, "--use-checkpoint-args"),
        ("Qwen3", True, 2, 1, "--use-checkpoint-args"),
        ("Qwen3", False, 2, 2, "--pretrained-checkpoint"),
        ("Llama", False, 2, 1, "--load"),
        ("Llama", False, 1, 2, "--use-checkpoint-args"),
    ],
)
def test_megatron_lm_loads_what_we_convert(
    family: str, tied: bool, tp: int, pp: int, how: str, models: Any, tokens: Tensor, tmp_path: Path
) -> None:
    hf, mcore = models[family, tied]
    from_checkpoint = how == "--use-checkpoint-args"
    arguments = _arguments(mcore, family, tp=tp, pp=pp, tied=tied, shape=[] if from_checkpoint else SHAPE)
    arguments += ["--load", str(mcore), how] if from_checkpoint else [how, str(mcore)]
    results = call(tp * pp, tmp_path, load_and_run, arguments, tokens, REPORTED)
    expected = _hf_logits(hf, tokens)
    for result in results:
        assert result.error == ""
        assert result.iteration == 0
        # The arguments that the model was built with are the checkpoint's, whoever said them.
        assert result.args["untie_embeddings_and_output_weights"] == (not tied)
        assert (result.args["num_layers"], result.args["num_query_groups"], result.args["kv_channels"]) == (4, 2, 32)
        assert (result.args["rotary_base"], result.args["position_embedding_type"]) == (20000, "rope")
        assert (result.args["swiglu"], result.args["normalization"]) == (True, "RMSNorm")
        assert result.args["add_bias_linear"] is False
        assert result.args["finetune"] == (how == "--pretrained-checkpoint")
        if from_checkpoint:
            assert result.args["padded_vocab_size"] == 384
    last = [result.logits for result in results if result.logits is not None]
    assert len(last) == tp
    for logits in last:
        assert (logits[..., :VOCAB] - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.slow
def test_norms_that_ask_for_an_extra_state(models: Any, tokens: Tensor, tmp_path: Path) -> None:
    """As Transformer Engine's do, with Megatron-LM's default strictness."""
    hf, mcore = models["Qwen3", False]
    arguments = [*_arguments(mcore, "Qwen3", tp=1, pp=2, tied=False, shape=SHAPE), "--load", str(mcore)]
    results = call(2, tmp_path, load_and_run, arguments, tokens, [], True)
    assert [result.error for result in results] == ["", ""]
    expected = _hf_logits(hf, tokens)
    assert (results[1].logits[..., :VOCAB] - expected).abs().max() < 2e-5 * expected.abs().max()
    # Loaded as asked for: where something is amiss Megatron-LM loads without strictness and says so.
    assert "load_return" not in (tmp_path / "log").read_text()
