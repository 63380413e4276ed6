"""What a rollout engine is to the trainer: token ids in, token ids and their log-probabilities out.

Engines serve the *current* policy: the trainer hands them its weights under HF names after every optimizer step, with
a version number, and refuses samples of any other version.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from megatron_oisd.errors import OISDError

INCONSISTENT_VERSION = -1
"""``weights_version`` after a refresh that failed half-way: no trainer's version, so its samples are refused."""


class StaleEngineError(OISDError):
    """The engine does not serve the version that it was given last, for example after a restart; a refresh mends it."""


class ServerError(OISDError):
    """A rollout server did not answer, or not with what was asked for; trying again may help."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How responses are drawn. ``temperature`` 0 means greedy; ``top_p`` 1 keeps the whole vocabulary.

    Raises:
        OISDError: a value is out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OISDError(f"max_new_tokens={self.max_new_tokens}: expected at least 1; raise it")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise OISDError(f"temperature={self.temperature}: expected 0 (greedy) or more; raise it")
        if not 0 < self.top_p <= 1:
            raise OISDError(f"top_p={self.top_p}: expected a value in (0, 1]; 1 keeps the whole vocabulary")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response.

    ``response_ids`` ends with the end-of-sequence token when ``finish_reason`` is ``"stop"``. ``logprobs`` holds one
    natural-log probability for each response token, under the sampling temperature and over the whole vocabulary.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class RolloutEngine(Protocol):
    """Generates responses with one fixed version of the weights until told otherwise."""

    weights_version: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        samples_per_prompt: int = 1,
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Sample ``samples_per_prompt`` responses for each prompt, in the caller's order.

        Args:
            prompts: token ids.
            sampling: how.
            samples_per_prompt: responses for each prompt.
            seeds: one for each prompt; the same prompt, seed and weights give the same responses, whatever other
                prompts are asked for with it (up to rounding in the logits).
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Replace every weight by the streamed ``(HF name, full tensor)`` pairs; a missing or unknown name raises."""
        ...

    def sleep(self) -> None:
        """Give the device memory back until :meth:`wake`; the weights are lost, an update must follow."""
        ...

    def wake(self) -> None:
        """Take the memory again, ready for :meth:`update_weights`."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class ModelLimits:
    """What prompts and responses must keep to."""

    vocab_size: int
    positions: int | None
    """Longest sequence, None: unknown."""

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelLimits:
        """Read them from a transformers configuration."""
        return cls(config.vocab_size, getattr(config, "max_position_embeddings", None))

    def check_request(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, samples_per_prompt: int, seeds: Sequence[int]
    ) -> None:
        """Refuse what no engine can answer.

        Raises:
            OISDError: an empty prompt, a token outside the vocabulary, a sequence longer than the model's positions, no
                samples, or another number of seeds than prompts.
        """
        if samples_per_prompt < 1:
            raise OISDError(f"samples_per_prompt={samples_per_prompt}: expected at least 1; raise it")
        if len(seeds) != len(prompts):
            raise OISDError(f"{len(seeds)} seeds for {len(prompts)} prompts: expected one for each")
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise OISDError(f"prompt {index} is empty; expected at least one token")
            if min(prompt) < 0 or max(prompt) >= self.vocab_size:
                raise OISDError(
                    f"prompt {index} has tokens in {min(prompt)}..{max(prompt)}, the model's vocabulary is "
                    f"0..{self.vocab_size - 1}; use the checkpoint's own tokenizer"
                )
            if self.positions is not None and len(prompt) + sampling.max_new_tokens > self.positions:
                raise OISDError(
                    f"prompt {index} of {len(prompt)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
                    f"model's {self.positions} positions; shorten one of them"
                )

    def make_rollout(
        self,
        prompt: Sequence[int],
        token_ids: Any,
        logprobs: Any,
        finish_reason: Any,
        *,
        sampling: SamplingParams,
        eos_token_ids: Collection[int],
    ) -> Rollout:
        """A rollout of what an engine returned, once all of it makes sense.

        Raises:
            OISDError: it cannot be a response to the request.
        """
        problem = _response_problem(token_ids, logprobs, finish_reason, self.vocab_size, sampling, eos_token_ids)
        if problem:
            raise OISDError(f"the rollout engine returned garbage: {problem}; look at its log, and restart it")
        return Rollout(
            prompt_ids=list(prompt), response_ids=list(token_ids), logprobs=[float(x) for x in logprobs],
            finish_reason=finish_reason,
        )  # fmt: skip


def _response_problem(
    tokens: Any, logprobs: Any, reason: Any, vocab_size: int, sampling: SamplingParams, ends: Collection[int]
) -> str | None:
    if not isinstance(tokens, list) or not tokens or any(type(token) is not int for token in tokens):
        return f"token ids {str(tokens)[:60]}"
    if len(tokens) > sampling.max_new_tokens:
        return f"{len(tokens)} tokens where {sampling.max_new_tokens} were asked for"
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        return f"tokens in {min(tokens)}..{max(tokens)} where the vocabulary is 0..{vocab_size - 1}"
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
        return f"log-probabilities {str(logprobs)[:60]} for {len(tokens)} tokens"
    # Rounding may bring a log-probability of a certain token above 0.
    if any(not isinstance(x, int | float) or not math.isfinite(x) or x > 1e-3 for x in logprobs):
        return "log-probabilities that are no finite numbers of at most 0"
    if reason not in ("stop", "length"):
        return f"finish reason {str(reason)[:60]!r}"
    if reason == "stop" and tokens[-1] not in ends:
        return f"a response that stopped without an end token (last token {tokens[-1]})"
    if any(token in ends for token in tokens[:-1]):
        return "a response that goes on after an end token"
    if reason == "length" and (len(tokens) != sampling.max_new_tokens or tokens[-1] in ends):
        return f"a response of {len(tokens)} tokens cut by a limit of {sampling.max_new_tokens}"
    return None
