"""From prompts to scored rollouts: what one step of the algorithm learns from, on all ranks together.

Every rank samples and scores a share of the prompts and then learns all results. A rank whose engine fails, or that is
asked to stop, tells the others in that exchange, so that all of them leave together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.data import PromptSampler, TokenizedPrompt
from megatron_oisd.rl.preemption import Interrupted, StopRequest
from megatron_oisd.rl.rewards import RewardFn
from megatron_oisd.rl.rollout.base import Rollout, RolloutEngine, SamplingParams, StaleEngineError
from megatron_oisd.rl.rollout.store import Experience, RolloutStore

Group = tuple[int, list[tuple[Rollout, float]]]
"""Row of the prompt in the data set, and its samples with their rewards."""


class Collector:
    """Draws prompts, samples responses, scores them.

    Args:
        engine: this rank's rollout engine.
        prompts: the data set.
        sampler: which of them each round uses.
        decode: token ids of a response to its text, which is what rewards see.
        reward: scores a response.
        sampling: how responses are drawn.
        samples_per_prompt: S, the size of a group.
        seed: with the number of the round and of the prompt it fixes every sample.
        max_rounds: 1 takes every group. With more, groups whose rewards are all equal, which teach nothing, are
            replaced by those of further rounds (DAPO's dynamic sampling), until there are enough or after this many
            rounds; what is then missing is filled up with such groups.
        store: keeps the rollouts until the next checkpoint, on rank 0; None elsewhere, or to keep none.
        stop: a request to leave ends sampling at once.
    """

    def __init__(
        self,
        *,
        engine: RolloutEngine,
        prompts: Sequence[TokenizedPrompt],
        sampler: PromptSampler,
        decode: Callable[[list[int]], str],
        reward: RewardFn,
        sampling: SamplingParams,
        samples_per_prompt: int,
        seed: int,
        max_rounds: int,
        store: RolloutStore | None,
        stop: StopRequest,
    ) -> None:
        self.engine, self.prompts, self.sampler, self.sampling = engine, prompts, sampler, sampling
        self._decode, self._reward, self._store, self._stop = decode, reward, store, stop
        self._samples, self._seed, self._max_rounds = samples_per_prompt, seed, max_rounds
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def collect(self, step: int, first_round: int) -> Experience:
        """The rollouts of the step after ``step`` finished ones, equal on every rank; a collective over all ranks.

        Args:
            step: finished steps; the engine must serve the weights of exactly that version.
            first_round: rounds of prompts that earlier steps drew.

        Raises:
            OISDError: the engine of a rank failed; raised on every rank.
            StaleEngineError: the engine of a rank lost the weights it was given; likewise.
            Interrupted: a rank was asked to stop; raised on every rank.
        """
        kept = self._kept(step)
        if kept is not None:
            return kept
        if self.engine.weights_version != step:
            raise RuntimeError(f"the engine serves weights {self.engine.weights_version}, expected {step}")
        wanted = self.sampler.prompts_per_step
        useful: list[Group] = []
        spare: list[Group] = []
        rounds = 0
        while rounds < self._max_rounds and len(useful) < wanted:
            for group in self._round(first_round + rounds):
                degenerate = len({reward for _, reward in group[1]}) == 1
                (spare if degenerate and self._max_rounds > 1 else useful).append(group)
            rounds += 1
        experience = _experience((useful + spare)[:wanted], rounds=rounds, sampled=len(useful) + len(spare))
        if self._store is not None:
            self._store.write(step, experience)
        return experience

    def _round(self, number: int) -> list[Group]:
        rows = self.sampler.step(number)
        share = rows[self._rank :: self._world_size]
        groups: list[Group] = []
        failure: OISDError | None = None
        interrupted = False
        try:
            with self._stop.interruptible():
                sampled = self.engine.generate(
                    [self.prompts[row].token_ids for row in share],
                    self.sampling,
                    samples_per_prompt=self._samples,
                    seeds=[derived_seed(self._seed, number, row) for row in share],
                )
                groups = [(row, self._score(row, rollouts)) for row, rollouts in zip(share, sampled, strict=True)]
        except Interrupted:
            interrupted = True
        except OISDError as error:
            failure = type(error)(str(error)) if isinstance(error, StaleEngineError) else OISDError(str(error))
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, (groups, failure, interrupted))
        failures = [error for _, error, _ in gathered if error is not None]
        if failures:  # one that a refresh does not mend first
            raise min(failures, key=lambda found: isinstance(found, StaleEngineError))
        if any(asked for _, _, asked in gathered):
            raise Interrupted
        return [gathered[i % self._world_size][0][i // self._world_size] for i in range(len(rows))]

    def _score(self, row: int, rollouts: list[Rollout]) -> list[tuple[Rollout, float]]:
        truth = self.prompts[row].record.ground_truth
        return [(rollout, float(self._reward(self._decode(rollout.response_ids), truth))) for rollout in rollouts]

    def _kept(self, step: int) -> Experience | None:
        found: list[Any] = [None, None]
        if self._store is not None:
            try:
                found[0] = self._store.read(step)
            except OISDError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise OISDError(found[1])
        return found[0]


def derived_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, without collisions between neighbours."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _experience(groups: list[Group], *, rounds: int, sampled: int) -> Experience:
    return Experience(
        groups=[row for row, _ in groups],
        rollouts=[rollout for _, samples in groups for rollout, _ in samples],
        rewards=torch.tensor([[reward for _, reward in samples] for _, samples in groups]),
        rounds=rounds,
        sampled_groups=sampled,
    )
