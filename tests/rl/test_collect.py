"""Collecting a step's rollouts: dynamic sampling, kept rollouts, and ranks that fail or leave together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.collect import Collector
from megatron_oisd.rl.data import PromptRecord, PromptSampler, TokenizedPrompt
from megatron_oisd.rl.preemption import Interrupted, StopRequest
from megatron_oisd.rl.rollout.base import Rollout, SamplingParams
from megatron_oisd.rl.rollout.store import RolloutStore
from tests.helpers.ranks import run_ranks

PROMPTS = 12


class _Engine:
    """Answers prompt p with token p and the sample's number; a prompt is "mixed" where one sample differs in reward."""

    def __init__(self) -> None:
        self.weights_version = 0
        self.calls: list[tuple[list[list[int]], list[int]]] = []
        self.behaviour: Any = lambda: None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        samples_per_prompt: int = 1,
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        self.calls.append(([list(prompt) for prompt in prompts], list(seeds)))
        self.behaviour()
        return [
            [
                Rollout(prompt_ids=list(p), response_ids=[p[0], sample], logprobs=[-1.0, -2.0], finish_reason="stop")
                for sample in range(samples_per_prompt)
            ]
            for p in prompts
        ]

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self.weights_version = version

    def close(self) -> None:
        pass


def _collector(
    *, mixed: Sequence[int], max_rounds: int = 1, store: RolloutStore | None = None, stop: StopRequest | None = None
) -> Collector:
    prompts = [TokenizedPrompt(PromptRecord(str(i), [], str(i), "test"), [i]) for i in range(PROMPTS)]
    return Collector(
        engine=_Engine(),
        prompts=prompts,
        sampler=PromptSampler(PROMPTS, 4, seed=5),
        decode=lambda tokens: " ".join(map(str, tokens)),
        # The first sample of a mixed prompt is right; of the others none.
        reward=lambda response, truth: float(int(truth) in mixed and response.endswith(" 0")),
        sampling=SamplingParams(max_new_tokens=4),
        samples_per_prompt=3,
        seed=9,
        max_rounds=max_rounds,
        store=store,
        stop=stop or StopRequest(),
    )


def _on_one_rank(body: Any) -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return body()
    finally:
        dist.destroy_process_group()


def test_without_dynamic_sampling_every_group_is_taken():
    def body() -> None:
        experience = _collector(mixed=[]).collect(0, 1)
        assert experience.groups == PromptSampler(PROMPTS, 4, seed=5).step(1)
        assert experience.rewards.tolist() == [[0.0] * 3] * 4
        assert (experience.rounds, experience.sampled_groups) == (1, 4)
        assert [r.response_ids for r in experience.rollouts[:4]] == [
            [experience.groups[i // 3], i % 3] for i in range(4)
        ]

    _on_one_rank(body)


def test_dynamic_sampling_replaces_groups_of_equal_rewards():
    def body() -> None:
        sampler = PromptSampler(PROMPTS, 4, seed=5)
        mixed = [sampler.step(0)[1], sampler.step(1)[0], sampler.step(1)[3], *sampler.step(2)]
        experience = _collector(mixed=mixed, max_rounds=10).collect(0, 0)
        assert experience.groups == [*mixed[:4]]  # in the order they were drawn; what is over is left out
        assert (experience.rounds, experience.sampled_groups) == (3, 12)
        assert all(max(row) > min(row) for row in experience.rewards.tolist())

    _on_one_rank(body)


def test_dynamic_sampling_gives_up_after_its_rounds_and_fills_up():
    def body() -> None:
        sampler = PromptSampler(PROMPTS, 4, seed=5)
        mixed = [sampler.step(1)[2]]
        experience = _collector(mixed=mixed, max_rounds=2).collect(0, 0)
        assert experience.groups == [mixed[0], *sampler.step(0)[:3]]
        assert experience.rounds == 2
        # The next step goes on with prompts that no round has drawn.
        further = _collector(mixed=[], max_rounds=1).collect(0, experience.rounds)
        assert further.groups == sampler.step(2)

    _on_one_rank(body)


def test_kept_rollouts_are_not_sampled_again(tmp_path):
    def body() -> None:
        first = _collector(mixed=[1], store=RolloutStore(tmp_path, "a"))
        sampled = first.collect(0, 0)
        again = _collector(mixed=[], store=RolloutStore(tmp_path, "a"))
        found = again.collect(0, 0)
        assert again.engine.calls == []  # type: ignore[attr-defined]
        assert found.rollouts == sampled.rollouts
        assert found.rewards.tolist() == sampled.rewards.tolist()
        other = _collector(mixed=[], store=RolloutStore(tmp_path, "another configuration"))
        other.collect(0, 0)
        assert len(other.engine.calls) == 1  # type: ignore[attr-defined]

    _on_one_rank(body)


def test_an_engine_with_other_weights_is_refused():
    def body() -> None:
        with pytest.raises(RuntimeError, match="weights 0, expected 3"):
            _collector(mixed=[]).collect(3, 0)

    _on_one_rank(body)


def _shares(folder: Path) -> tuple[list[int], list[list[float]], int]:
    dist.init_process_group("gloo")
    store = RolloutStore(folder, "a") if dist.get_rank() == 0 else None
    collector = _collector(mixed=[2, 3], store=store)
    experience = collector.collect(0, 0)
    (call,) = collector.engine.calls  # type: ignore[attr-defined]
    kept = _collector(mixed=[], store=store).collect(0, 0)
    assert kept.rollouts == experience.rollouts
    return experience.groups, experience.rewards.tolist(), len(call[0])


def test_ranks_share_the_prompts_and_learn_all_results(tmp_path):
    first, second = run_ranks(2, _shares, tmp_path)
    assert first[:2] == second[:2]
    assert first[0] == PromptSampler(PROMPTS, 4, seed=5).step(0)
    assert (first[2], second[2]) == (2, 2)


def _trouble(kind: str) -> tuple[str, float]:
    dist.init_process_group("gloo")

    def fail() -> None:
        raise OISDError("server http://127.0.0.1:1 does not answer: start it")

    def ask_to_stop() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(20)

    start = time.monotonic()
    with StopRequest() as stop:
        collector = _collector(mixed=[], stop=stop)
        if dist.get_rank() == 1:
            collector.engine.behaviour = fail if kind == "fail" else ask_to_stop  # type: ignore[attr-defined]
        try:
            collector.collect(0, 0)
        except (OISDError, Interrupted) as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing", 0.0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fail", "OISDError: server http://127.0.0.1:1 does not answer: start it"),
        ("stop", "Interrupted: "),
    ],
)
def test_what_stops_one_rank_stops_all_with_the_same_words(kind, said):
    for text, seconds in run_ranks(2, _trouble, kind):
        assert text == said
        assert seconds < 15
