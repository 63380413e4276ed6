"""What a rollout engine is to the trainer: token ids in, token ids and their log-probabilities out.

Engines serve the *current* policy: the trainer hands them its weights under HF names after every optimizer step, with
a version number, and refuses samples of any other version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How responses are drawn. ``temperature`` 0 means greedy; ``top_p`` 1 keeps the whole vocabulary."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response.

    ``response_ids`` ends with the end-of-sequence token when ``finish_reason`` is ``"stop"``. ``logprobs`` holds one
    natural-log probability for each response token, under the sampling temperature.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class RolloutEngine(Protocol):
    """Generates responses with one fixed version of the weights until told otherwise."""

    weights_version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, samples_per_prompt: int = 1, seed: int
    ) -> list[list[Rollout]]:
        """Sample ``samples_per_prompt`` responses for each prompt; same seed, weights and prompts: same rollouts."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replace every weight by the streamed ``(HF name, full tensor)`` pairs; a missing or unknown name raises."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...
