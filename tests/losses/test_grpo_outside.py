"""The policy losses against TRL's ``GRPOTrainer`` on the same tensors: value and every parameter's gradient.

Skipped where TRL is not installed (extra ``bench``). TRL's ``grpo``, ``bnpo``, ``dapo`` and ``dr_grpo`` are the
aggregations below; its ``delta`` is the dual clip. TRL sees the whole vocabulary in one process, so this says nothing
of shards: tests/rl/test_policy.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oisd.losses.aggregate import token_weights
from megatron_oisd.losses.grpo import kl_penalty, policy_loss, vocab_parallel_log_probs
from tests.helpers.checkpoints import make_hf_checkpoint

pytest.importorskip("trl", reason="needs trl (extra bench)", exc_type=ImportError)

PROMPT, COMPLETION = 5, 7
MODES = {
    "grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dapo": "token-mean", "dr_grpo": "seq-mean-token-sum-norm",
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_hf_checkpoint(tmp_path / "hf", family="Qwen3", tied=True, tokenizer=True)


def trl_trainer(checkpoint: Path, output: Path, **options: Any) -> Any:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = GRPOConfig(
        output_dir=str(output), per_device_train_batch_size=4, num_generations=4, max_completion_length=COMPLETION,
        use_cpu=True, bf16=False, fp16=False, report_to=[], disable_dropout=True, **options,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "1"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_inputs(vocab_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, vocab_size, (4, PROMPT), generator=generator)
    completions = torch.randint(3, vocab_size, (4, COMPLETION), generator=generator)
    prompt_mask = torch.arange(PROMPT) >= torch.tensor([0, 2, 1, 4]).unsqueeze(1)  # padded on the left
    mask = torch.arange(COMPLETION) < torch.tensor([7, 3, 5, 1]).unsqueeze(1)
    return {
        "prompt_ids": prompts, "prompt_mask": prompt_mask.long(), "completion_ids": completions,
        "completion_mask": mask.long(), "advantages": torch.tensor([1.2, -0.8, 0.4, -1.5]),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def old_and_reference(trainer: Any, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """Log-probabilities near the policy's, so that some ratios are clipped and some are not."""
    generator = torch.Generator().manual_seed(6)
    logits = completion_logits(trainer.model, inputs)
    log_p = logits.log_softmax(-1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1).detach()
    for scale in (0.4, 0.3):
        yield log_p + scale * torch.randn(log_p.shape, generator=generator)


def completion_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[B, T, V]`` at the positions that predict the completion, as TRL asks the model for them."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return model(input_ids=tokens, attention_mask=mask).logits[:, PROMPT - 1 : -1]


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("clip", [(0.2, 0.2, None), (0.1, 0.28, None), (0.2, 0.2, 1.5)])
@pytest.mark.parametrize("loss_type", MODES)
def test_value_and_gradients_equal_trls(checkpoint, tmp_path, loss_type, clip, beta):
    low, high, dual = clip
    trainer = trl_trainer(
        checkpoint, tmp_path / "trl", loss_type=loss_type, epsilon=low, epsilon_high=high, delta=dual, beta=beta,
        temperature=1.0, use_bias_correction_kl=False,
    )  # fmt: skip
    model = trainer.model.train()
    inputs = make_inputs(model.config.vocab_size)
    old, reference = old_and_reference(trainer, inputs)
    theirs = trainer._compute_loss(model, {**inputs, "old_per_token_logps": old, "ref_per_token_logps": reference})
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(theirs, parameters)

    mask = inputs["completion_mask"].bool()
    logits = completion_logits(model, inputs)
    log_probs = vocab_parallel_log_probs(logits[mask], inputs["completion_ids"][mask]).log_probs
    advantages = inputs["advantages"].unsqueeze(1).expand(mask.shape)[mask]
    result = policy_loss(log_probs, old[mask], advantages, clip_low=low, clip_high=high, dual_clip=dual)
    assert 0 < result.clipped.sum() < len(result.clipped)
    per_token = result.loss + beta * kl_penalty(log_probs, reference[mask], "k3")
    weights = token_weights(mask, MODES[loss_type], max_response_tokens=COMPLETION)
    ours = (per_token * weights[mask]).sum() / mask.sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, mine, other in zip(names, torch.autograd.grad(ours, parameters), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6, msg=name)
