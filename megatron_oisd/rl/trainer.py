"""The training loop: GRPO with the two OISD losses. :meth:`Trainer.train_step` reads like the algorithm."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_oisd.config import OISDConfig
from megatron_oisd.convert.checkpoint import HF_DIRECTORY, latest_iteration, load_model, read_arguments, save_model
from megatron_oisd.convert.output import LATEST
from megatron_oisd.convert.weights import export_hf_weights
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.advantage import group_advantages
from megatron_oisd.losses.numerics import group_size
from megatron_oisd.pipeline.oisd import OISD
from megatron_oisd.rl.batch import RolloutBatch, make_batch
from megatron_oisd.rl.config import TrainConfig
from megatron_oisd.rl.data import PromptSampler, TokenizedPrompt, load_prompts, tokenize_prompts
from megatron_oisd.rl.metrics_log import MetricsLog
from megatron_oisd.rl.policy import ParallelGroups, PolicyMicrobatch, PolicyPass
from megatron_oisd.rl.rewards import get_reward
from megatron_oisd.rl.rollout.base import Rollout, SamplingParams
from megatron_oisd.rl.setup import build_engine, build_training, load_tokenizer
from megatron_oisd.runtime import distributed

CHECKPOINTS = "checkpoints"


class Trainer:
    """One run on this rank; every rank of the job makes one and calls :meth:`run`.

    Args:
        config: the run.
        oisd_config: the OISD losses; with both lambdas 0 the run is plain GRPO, bit for bit.
    """

    def __init__(self, config: TrainConfig, oisd_config: OISDConfig) -> None:
        self.config = config
        distributed.initialize(tensor_parallel=config.tp, pipeline_parallel=config.pp, seed=config.seed)
        self.groups = ParallelGroups.from_megatron()
        config.check_data_parallel(group_size(self.groups.dp))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.output = Path(config.output)
        self.checkpoints = self.output / CHECKPOINTS

        read_arguments(config.load)  # names a checkpoint that is not there before its tokenizer is missed
        self.reward = get_reward(config.reward)
        self.tokenizer = load_tokenizer(config.load)
        self.prompts = self._load_prompts()
        self.sampler = PromptSampler(len(self.prompts), config.prompts_per_step, config.seed)

        self.training = build_training(config)
        self.oisd = OISD(
            oisd_config, self.training.chunks, tp_group=self.groups.tp, pp_group=self.groups.pp,
            dp_group=self.groups.dp, vocab_size=self.training.arguments.vocab_size,
        )  # fmt: skip
        self.policy = PolicyPass(
            self.training.chunks, self.training.model_config, self.oisd, config.policy_loss, self.groups,
            self.training.arguments.vocab_size,
        )  # fmt: skip
        self.engine = build_engine(config, self.tokenizer)
        self.sampling = SamplingParams(
            max_new_tokens=config.max_response_tokens, temperature=config.temperature, top_p=config.top_p
        )
        self.step = self._resume()

    # ------------------------------------------------------------------------------------------- the algorithm

    def run(self) -> None:
        """Train to the last step; rank 0 shows progress and writes the metrics."""
        log = MetricsLog(self.output) if self.rank == 0 else None
        self._refresh_engine()
        with tqdm(
            total=self.config.num_steps, initial=self.step, desc="train", unit="step", disable=self.rank != 0
        ) as bar:
            while self.step < self.config.num_steps:
                metrics = self.train_step()
                bar.update()
                bar.set_postfix(reward=f"{metrics['reward/mean']:.3f}", loss=f"{metrics['actor/loss']:.3f}")
                if log is not None:
                    log.write(self.step, metrics)
                if self.step % self.config.save_interval == 0 or self.step == self.config.num_steps:
                    self.save()
        if log is not None:
            log.close()

    def train_step(self) -> dict[str, float]:
        """Roll out, score, normalise, update; returns the step's metrics, equal on every rank."""
        clock = _Clock()
        prompts = [self.prompts[i] for i in self.sampler.step(self.step)]

        rollouts, rewards = self._roll_out(prompts)
        metrics = _rollout_metrics(rollouts, rewards) | clock.lap("generate")

        advantages = group_advantages(rewards)
        batch = make_batch(rollouts, advantages.flatten(), pad_token_id=self.engine_pad_token)
        old_log_probs = self._log_probs(batch)
        metrics |= self._mismatch(batch, old_log_probs) | clock.lap("log_probs")

        rows = self.config.mini_batch_prompts * self.config.samples_per_prompt
        updates = []
        for start in range(0, len(batch), rows):
            chosen = slice(start, start + rows)
            number = (self.step * len(batch) + start) // rows
            updates.append(self._update(batch.select(chosen), old_log_probs[chosen], number))
        metrics |= {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]} | clock.lap("update")

        self.step += 1
        self._refresh_engine()
        metrics |= clock.lap("refresh")
        return metrics | {"time/step": clock.total()}

    def _roll_out(self, prompts: list[TokenizedPrompt]) -> tuple[list[Rollout], torch.Tensor]:
        """Sample and score; every rank takes a share of the prompts and learns all results.

        Returns:
            Rollouts, prompt-major, and rewards ``[prompts, samples]``.
        """
        if self.engine.weights_version != self.step:
            raise RuntimeError(f"the engine serves weights {self.engine.weights_version}, expected {self.step}")
        share = prompts[self.rank :: self.world_size]
        groups = self.engine.generate(
            [prompt.token_ids for prompt in share],
            self.sampling,
            samples_per_prompt=self.config.samples_per_prompt,
            seed=_seed(self.config.seed, self.step, self.rank),
        )
        scored = [
            [(rollout, self.reward(self._text(rollout), prompt.record.ground_truth)) for rollout in group]
            for prompt, group in zip(share, groups, strict=True)
        ]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, scored)
        ordered = [gathered[i % self.world_size][i // self.world_size] for i in range(len(prompts))]
        rollouts = [rollout for group in ordered for rollout, _ in group]
        rewards = torch.tensor([[reward for _, reward in group] for group in ordered])
        return rollouts, rewards

    def _log_probs(self, batch: RolloutBatch) -> torch.Tensor:
        """``[B, s]`` log-probabilities of the rollouts under the weights that sampled them (this rank's rows)."""
        result = torch.zeros(batch.tokens.shape)
        rows = self._my_rows(len(batch))
        microbatches = self._microbatches(batch, rows, None)
        values = self.policy.log_probs(microbatches)
        for microbatch, value in zip(microbatches, values, strict=True):
            width = min(value.shape[1], result.shape[1])
            result[microbatch.sequence_ids, :width] = value[:, :width].cpu()
        return result

    def _update(self, batch: RolloutBatch, old_log_probs: torch.Tensor, number: int) -> dict[str, float]:
        """Optimizer step ``number`` of the run, on one mini-batch."""
        training = self.training
        for chunk in training.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        training.optimizer.zero_grad()
        losses = self.policy.gradients(
            self._microbatches(batch, self._my_rows(len(batch)), old_log_probs),
            num_sequences=len(batch),
            num_tokens=int(batch.mask.sum()),
            step=number,
        )
        if not math.isfinite(losses["loss"]):
            raise OISDError(
                f"the loss of step {self.step + 1} is {losses['loss']}: lower --lr (now {self.config.lr:g}) or check "
                "the checkpoint's weights for NaN; nothing was updated"
            )
        successful, grad_norm, _ = training.optimizer.step()
        if not successful or not math.isfinite(grad_norm):
            raise OISDError(
                f"the gradient norm of step {self.step + 1} is {grad_norm}: lower --lr (now {self.config.lr:g}); the "
                f"last checkpoint in {self.checkpoints} is unharmed"
            )
        training.scheduler.step(1)
        self.oisd.sync()
        metrics = {f"actor/{name}": value for name, value in losses.items()}
        return metrics | {"actor/grad_norm": grad_norm, "actor/lr": _learning_rate(training)} | self.oisd.metrics()

    # ------------------------------------------------------------------------------------------- its parts

    @property
    def engine_pad_token(self) -> int:
        """Token that fills training batches on the right."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _load_prompts(self) -> list[TokenizedPrompt]:
        records = load_prompts(self.config.data, system_prompt=self.config.system_prompt)[: self.config.limit_prompts]
        prompts, dropped = tokenize_prompts(records, self.tokenizer, max_prompt_tokens=self.config.max_prompt_tokens)
        if dropped and self.rank == 0:
            print(
                f"{dropped} of {len(records)} prompts are longer than {self.config.max_prompt_tokens} tokens: dropped"
            )
        return prompts

    def _text(self, rollout: Rollout) -> str:
        return self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)

    def _my_rows(self, count: int) -> list[int]:
        dp = self.groups.dp
        return list(range(count)) if dp is None else list(range(dp.rank(), count, dp.size()))

    def _microbatches(
        self, batch: RolloutBatch, rows: list[int], old_log_probs: torch.Tensor | None
    ) -> list[PolicyMicrobatch]:
        device = next(self.training.chunks[0].parameters()).device
        return batch.microbatches(
            rows, size=self.config.micro_batch_size, length_multiple=self.config.tp, old_log_probs=old_log_probs,
            device=device,
        )  # fmt: skip

    def _mismatch(self, batch: RolloutBatch, log_probs: torch.Tensor) -> dict[str, float]:
        """How far the engine's log-probabilities are from the trainer's, over the data-parallel ranks' rows."""
        rows = self._my_rows(len(batch))
        difference = (batch.rollout_log_probs[rows] - log_probs[rows])[batch.mask[rows]].abs()
        total = torch.tensor([difference.sum(), float(difference.numel())], dtype=torch.float64)
        largest = difference.max() if difference.numel() else difference.new_zeros(())
        if group_size(self.groups.dp) > 1:
            device = next(self.training.chunks[0].parameters()).device
            total, largest = total.to(device), largest.to(device)
            dist.all_reduce(total, group=self.groups.dp)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.dp)
        mean = (total[0] / total[1].clamp_min(1)).item()
        return {"rollout/log_prob_diff_mean": mean, "rollout/log_prob_diff_max": largest.item()}

    def _refresh_engine(self) -> None:
        """Stream the current weights into the engine; a collective, since every rank holds a part of them."""
        assert self.groups.tp is not None
        assert self.groups.pp is not None
        tensors = export_hf_weights(
            self.training.chunks, self.training.arguments, tp_group=self.groups.tp, pp_group=self.groups.pp
        )
        self.engine.update_weights(tensors, version=self.step)

    def save(self) -> None:
        """Write a checkpoint of the finished step and remove the oldest beyond ``keep_checkpoints``."""
        save_model(
            self.training.chunks, self.checkpoints, self.step, self.training.arguments,
            hf_source=Path(self.config.load) / HF_DIRECTORY, extra_state=self.training.optimizer_state(loading=False),
        )  # fmt: skip
        if self.rank == 0:
            for old in sorted(self.checkpoints.glob("iter_*"))[: -self.config.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> int:
        """Load the newest checkpoint of the run where asked to; returns the number of finished steps."""
        exists = (self.checkpoints / LATEST).is_file()
        if not self.config.resume:
            if exists:
                raise OISDError(
                    f"{self.output} already holds a run at step {latest_iteration(self.checkpoints)}: go on with "
                    "--resume or choose another --output"
                )
            return 0
        if not exists:
            return 0
        template = self.training.optimizer_state(loading=True)
        state = load_model(self.training.chunks, self.checkpoints, extra_state=template)
        self.training.load_optimizer_state(state)
        self.oisd.sync()
        return int(state["iteration"])


def _rollout_metrics(rollouts: list[Rollout], rewards: torch.Tensor) -> dict[str, float]:
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    spread = rewards.amax(1) - rewards.amin(1)
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std_in_group": rewards.std(dim=1, correction=0).mean().item(),
        "reward/degenerate_groups": (spread == 0).float().mean().item(),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": float(max(lengths)),
        "response_length/clip_ratio": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }


def _learning_rate(training: Any) -> float:
    return float(training.optimizer.param_groups[0]["lr"]) if training.optimizer.param_groups else 0.0


def _seed(*parts: int) -> int:
    """One 63-bit seed from several integers, without collisions between neighbours."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _Clock:
    """Wall seconds since the last lap."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return {f"time/{name}": seconds}

    def total(self) -> float:
        return time.perf_counter() - self._start
