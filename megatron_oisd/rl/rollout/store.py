"""Rollouts kept on disk until a checkpoint makes them superfluous.

Generation is most of a step's time. A run that was killed goes back to its last checkpoint and takes the updates after
it again; with the rollouts of those steps at hand it need not sample them again, and it repeats the same trajectory
also with an engine whose samples depend on timing.

One file for each step since the last checkpoint, ``step_0000012.safetensors``, written whole or not at all:

    groups [G] int64            row of each group's prompt in the data set
    rewards [G, S] float64      of each of a group's S samples
    prompt_lengths, response_lengths [G * S] int64
    tokens [sum of both] int32  prompt and response of each sample
    logprobs [sum of response_lengths] float64
    stopped [G * S] uint8       1: ended by itself, 0: cut at the limit
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import Rollout

SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What one step learns from: G groups of S rollouts with their rewards."""

    groups: list[int]
    """Row of each group's prompt in the data set."""
    rollouts: list[Rollout]
    """``G * S``, a group's samples side by side."""
    rewards: Tensor
    """``[G, S]``."""
    rounds: int
    """How many rounds of prompts were drawn for it: 1, or more with dynamic sampling."""
    sampled_groups: int
    """Groups sampled in all, those that dynamic sampling left out included."""


class RolloutStore:
    """The directory of those files; used on one rank.

    Args:
        directory: made when the first file is written.
        fingerprint: of all that the rollouts depend on. Files with another one are not used.
    """

    def __init__(self, directory: str | Path, fingerprint: str) -> None:
        self.directory = Path(directory)
        self.fingerprint = fingerprint

    def path(self, step: int) -> Path:
        """File of the rollouts of the step after ``step`` finished ones."""
        return self.directory / f"step_{step:07d}{SUFFIX}"

    def write(self, step: int, experience: Experience) -> None:
        """Keep the rollouts of a step.

        Raises:
            OISDError: the file cannot be written.
        """
        from safetensors.torch import save_file

        rollouts = experience.rollouts
        tensors = {
            "groups": torch.tensor(experience.groups, dtype=torch.int64),
            "rewards": experience.rewards.double(),
            "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in rollouts], dtype=torch.int64),
            "response_lengths": torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.int64),
            "tokens": torch.tensor([t for r in rollouts for t in (*r.prompt_ids, *r.response_ids)], dtype=torch.int32),
            "logprobs": torch.tensor([x for r in rollouts for x in r.logprobs], dtype=torch.float64),
            "stopped": torch.tensor([r.finish_reason == "stop" for r in rollouts], dtype=torch.uint8),
        }
        metadata = {
            "fingerprint": self.fingerprint,
            "rounds": str(experience.rounds),
            "sampled_groups": str(experience.sampled_groups),
        }
        target = self.path(step)
        work = target.with_name(f".{target.name}.incomplete")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, work, metadata)
            with work.open("rb") as file:
                os.fsync(file.fileno())
            work.replace(target)
        except OSError as error:
            raise OISDError(
                f"{target}: the rollouts cannot be kept ({error.strerror}); free space there or turn "
                "--no-durable-rollouts on"
            ) from error

    def read(self, step: int) -> Experience | None:
        """The rollouts kept for a step; None where there are none, or none of this run's configuration."""
        from safetensors import SafetensorError, safe_open

        path = self.path(step)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != self.fingerprint:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise OISDError(f"{path}: the kept rollouts cannot be read ({error}); remove that file") from error
        rollouts = []
        tokens, logprobs = tensors["tokens"].tolist(), tensors["logprobs"].tolist()
        token = logprob = 0
        lengths = zip(tensors["prompt_lengths"].tolist(), tensors["response_lengths"].tolist(), strict=True)
        for (prompt, response), stopped in zip(lengths, tensors["stopped"].tolist(), strict=True):
            rollouts.append(
                Rollout(
                    prompt_ids=tokens[token : token + prompt],
                    response_ids=tokens[token + prompt : token + prompt + response],
                    logprobs=logprobs[logprob : logprob + response],
                    finish_reason="stop" if stopped else "length",
                )
            )
            token, logprob = token + prompt + response, logprob + response
        return Experience(
            groups=tensors["groups"].tolist(),
            rollouts=rollouts,
            rewards=tensors["rewards"].float(),
            rounds=int(metadata["rounds"]),
            sampled_groups=int(metadata["sampled_groups"]),
        )

    def discard(self, *, before: int | None = None) -> None:
        """Remove the files of steps lower than ``before``; None: all of them."""
        for path in self.directory.glob(f"step_*{SUFFIX}"):
            number = path.name.removeprefix("step_").removesuffix(SUFFIX)
            if number.isdecimal() and (before is None or int(number) < before):
                path.unlink(missing_ok=True)
