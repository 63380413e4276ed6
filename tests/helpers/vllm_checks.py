"""What the vLLM tests run in processes of their own: vLLM changes the process that imports it.

    python -m tests.helpers.vllm_checks engine MODEL {0,1}    an engine in process (0) or beside it (1), refreshed twice
    python -m tests.helpers.vllm_checks exports MODEL ...     checkpoints loaded by vLLM, compared with transformers
    python -m tests.helpers.vllm_checks train ...             tools/train_rl.py with a reward for random models

The first two print one JSON object as their last line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

PROMPTS = [[5, 6, 7, 8], [9], [3, 4, 20, 21, 22, 23, 24]]


def worst_log_prob_error(model: Any, groups: Any) -> float:
    """Largest difference between an engine's log-probabilities and a direct forward's."""
    worst = 0.0
    for rollout in (rollout for group in groups for rollout in group):
        tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            log_p = model(tokens).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        mine = log_p.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        worst = max(worst, (mine - torch.tensor(rollout.logprobs)).abs().max().item())
    return worst


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def check_engine(path: str, multiprocess: bool) -> dict[str, Any]:
    """Random weights, two refreshes, one that breaks off, one that mends it."""
    from megatron_oisd.convert.fused import split_views
    from megatron_oisd.errors import OISDError
    from megatron_oisd.rl.rollout.base import SamplingParams
    from megatron_oisd.rl.rollout.vllm_engine import VLLMEngine

    sampling = SamplingParams(max_new_tokens=16)
    model = load(path)
    weights = split_views(model.state_dict())  # follows the model
    engine = VLLMEngine(
        path, eos_token_ids=[1], sampling=sampling, load_weights=False, multiprocess=multiprocess, memory_fraction=0.1
    )
    result: dict[str, Any] = {"errors": [], "unlike_before": []}
    earlier = engine.generate(PROMPTS, sampling, samples_per_prompt=3, seeds=[1, 2, 3])
    for version in (1, 2):
        engine.update_weights(iter(weights.items()), version=version)
        groups = engine.generate(PROMPTS, sampling, samples_per_prompt=3, seeds=[1, 2, 3])
        result["errors"].append(worst_log_prob_error(model, groups))
        result["unlike_before"].append(groups != earlier)
        earlier = groups
        alone = engine.generate(PROMPTS[1:2], sampling, samples_per_prompt=3, seeds=[2])
        result["alone"] = [a.response_ids for a in alone[0]] == [g.response_ids for g in groups[1]]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
    # More tokens than one step of the engine takes: the prompt at the border may not be split.
    crowd = engine.generate([[2 + i % 20] * 97 for i in range(120)], sampling, seeds=list(range(120)))
    result["crowd"] = [len(group) for group in crowd].count(1)
    result["refusals"] = []
    for action in (
        lambda: engine.update_weights(
            ((name, tensor) for name, tensor in weights.items() if name != "model.norm.weight"), version=3
        ),
        lambda: engine.generate(PROMPTS, sampling, seeds=[1, 2, 3]),
        lambda: engine.generate(PROMPTS, SamplingParams(max_new_tokens=4, temperature=0.5), seeds=[1, 2, 3]),
        lambda: engine.generate([[10**6]], sampling, seeds=[1]),
    ):
        try:
            action()
        except OISDError as error:
            result["refusals"].append(str(error))
    engine.update_weights(iter(weights.items()), version=3)
    result["errors"].append(worst_log_prob_error(model, engine.generate(PROMPTS, sampling, seeds=[1, 2, 3])))
    engine.close()
    return result


def check_exports(paths: list[str]) -> dict[str, Any]:
    """Sampled log-probabilities and greedy tokens of each checkpoint."""
    import gc

    from megatron_oisd.rl.rollout.base import SamplingParams
    from megatron_oisd.rl.rollout.vllm_engine import VLLMEngine

    result = {}
    for path in paths:
        sampling = SamplingParams(max_new_tokens=24)
        model = load(path)
        engine = VLLMEngine.from_pretrained(path, sampling=sampling, multiprocess=False, memory_fraction=0.05)
        groups = engine.generate(PROMPTS, sampling, samples_per_prompt=4, seeds=[1, 2, 3])
        greedy = engine.generate(PROMPTS, SamplingParams(max_new_tokens=24, temperature=0), seeds=[0] * 3)
        same = 0
        for (rollout,) in greedy:
            tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            with torch.no_grad():
                expected = model(tokens).logits[0, len(rollout.prompt_ids) - 1 : -1].argmax(-1).tolist()
            same += sum(a == b for a, b in zip(expected, rollout.response_ids, strict=True))
        count = sum(len(rollout.response_ids) for (rollout,) in greedy)
        result[path] = {"error": worst_log_prob_error(model, groups), "greedy": count, "same": same}
        engine.close()
        del engine
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    return result


def train(arguments: list[str]) -> int:
    """The training command, with a rule that gives random models rewards of both kinds."""
    from megatron_oisd.rl.rewards import REWARDS
    from tests.helpers.training import load_script

    REWARDS["parity"] = lambda response, truth: float(len(response) % 2)
    return int(load_script("tools/train_rl.py").main(arguments))


def main() -> int:
    kind, *arguments = sys.argv[1:]
    if kind == "train":
        return train(arguments)
    result = check_exports(arguments) if kind == "exports" else check_engine(arguments[0], arguments[1] == "1")
    print("\n" + json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
