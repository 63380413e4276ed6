"""The training loop: GRPO with the two OISD losses. :meth:`Trainer.train_step` reads like the algorithm."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_oisd.config import OISDConfig
from megatron_oisd.convert.checkpoint import (
    HF_DIRECTORY,
    iteration_name,
    iterations,
    latest_iteration,
    load_model,
    newest_whole_iteration,
    read_arguments,
    save_model,
    whole_iteration,
)
from megatron_oisd.convert.output import LATEST
from megatron_oisd.convert.safe_pickle import read_metadata
from megatron_oisd.convert.weights import export_hf_weights
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.advantage import group_advantages
from megatron_oisd.losses.aggregate import token_weights
from megatron_oisd.losses.numerics import group_size
from megatron_oisd.losses.off_policy import mismatch, rejection_mask, truncated_importance
from megatron_oisd.pipeline.oisd import OISD
from megatron_oisd.rl.arguments import write_config
from megatron_oisd.rl.batch import RolloutBatch, make_batch, make_microbatches, plan_microbatches
from megatron_oisd.rl.collect import Collector, derived_seed
from megatron_oisd.rl.config import TrainConfig, trajectory_fingerprint
from megatron_oisd.rl.data import PromptSampler, TokenizedPrompt, load_prompts, tokenize_prompts
from megatron_oisd.rl.metrics_log import MetricsLog, RolloutSample, WandbRun
from megatron_oisd.rl.policy import ParallelGroups, PolicyMicrobatch, PolicyPass
from megatron_oisd.rl.preemption import Interrupted, StopRequest
from megatron_oisd.rl.reference import ReferenceModel
from megatron_oisd.rl.rewards import get_reward
from megatron_oisd.rl.rollout.base import ServerError, StaleEngineError
from megatron_oisd.rl.rollout.factory import build_engine, sampling_params
from megatron_oisd.rl.rollout.store import Experience, RolloutStore
from megatron_oisd.rl.setup import build_training, load_tokenizer
from megatron_oisd.runtime import distributed

CHECKPOINTS = "checkpoints"
ROLLOUTS = "rollout_state"


class Trainer:
    """One run on this rank; every rank of the job makes one and calls :meth:`run`.

    Args:
        config: the run.
        oisd_config: the OISD losses; with both lambdas 0 the run is plain GRPO, bit for bit.
    """

    def __init__(self, config: TrainConfig, oisd_config: OISDConfig) -> None:
        self.config = config
        distributed.initialize(
            tensor_parallel=config.tp, pipeline_parallel=config.pp, expert_parallel=config.ep,
            expert_tensor_parallel=config.etp, seed=config.seed,
        )  # fmt: skip
        self.groups = ParallelGroups.from_megatron()
        config.check_data_parallel(group_size(self.groups.dp))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.output = Path(config.output)
        self.checkpoints = self.output / CHECKPOINTS

        read_arguments(config.load)  # names a checkpoint that is not there before its tokenizer is missed
        get_reward(config.reward)
        self.tokenizer = load_tokenizer(config.load)
        self.prompts = self._load_prompts()

        self.training = build_training(config)
        self.oisd = self._attach(oisd_config)
        self.policy = PolicyPass(
            self.training.chunks, self.training.model_config, self.oisd, config.policy_loss, self.groups,
            self.training.arguments.vocab_size,
        )  # fmt: skip
        self.reference = ReferenceModel(self.training.chunks) if config.kl_loss_coef else None
        self.stop = StopRequest()
        self.engine = build_engine(config, self.tokenizer)
        keeps_rollouts = config.durable_rollouts and self.rank == 0
        fingerprint = trajectory_fingerprint(config, oisd_config)
        self.store = RolloutStore(self.output / ROLLOUTS, fingerprint) if keeps_rollouts else None
        self.collector = Collector(
            engine=self.engine,
            prompts=self.prompts,
            sampler=PromptSampler(len(self.prompts), config.prompts_per_step, config.seed),
            decode=lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True),
            reward=get_reward(config.reward),
            sampling=sampling_params(config),
            samples_per_prompt=config.samples_per_prompt,
            seed=config.seed,
            max_rounds=config.dynamic_sampling_max_rounds if config.dynamic_sampling else 1,
            store=self.store,
            stop=self.stop,
        )
        self.step = 0
        """Finished steps."""
        self.rounds = 0
        """Rounds of prompts drawn: one a step, more with dynamic sampling."""
        self.saved_step: int | None = None
        self._experience: Experience | None = None
        self._asleep = False
        self._resume()

    # ------------------------------------------------------------------------------------------- the algorithm

    def run(self) -> bool:
        """Train to the last step; rank 0 shows progress and writes the metrics.

        Returns:
            True when all steps are done, False when SIGTERM or SIGUSR1 asked the run to leave: it then has written a
            checkpoint, and goes on from there with ``--resume``.
        """
        log = self._open_log() if self.rank == 0 else None
        bar = tqdm(total=self.config.num_steps, initial=self.step, desc="train", unit="step", disable=self.rank != 0)
        try:
            with bar, self.stop:
                self._refresh_engine()
                while self.step < self.config.num_steps:
                    try:
                        metrics = self.train_step()
                    except Interrupted:
                        self.save()
                        return False
                    bar.update()
                    bar.set_postfix(
                        reward=f"{metrics['critic/rewards/mean']:.3f}", loss=f"{metrics['actor/loss']:.3f}",
                        tokens_per_s=f"{metrics['perf/throughput'] * self.world_size:.0f}",
                    )  # fmt: skip
                    if log is not None:
                        log.write(self.step, metrics)
                        self._log_samples(log)
                    if self.step % self.config.save_interval == 0 or self.step == self.config.num_steps:
                        self.save()
                return True
        finally:
            self.engine.close()
            if log is not None:
                log.close()

    def _open_log(self) -> MetricsLog:
        config = self.config
        write_config(self.output, config, self.oisd.config)
        wandb = None
        if config.wandb_project:
            wandb = WandbRun(
                config.wandb_project, name=config.wandb_name or self.output.name, mode=config.wandb_mode,
                config=dataclasses.asdict(config) | {"oisd": dataclasses.asdict(self.oisd.config)},
            )  # fmt: skip
        return MetricsLog(self.output, keep_until=self.step, wandb=wandb)

    def _log_samples(self, log: MetricsLog) -> None:
        """A few of the step's rollouts as text."""
        config, experience = self.config, self._experience
        if experience is None or not config.log_samples or (self.step - 1) % config.log_samples_interval:
            return
        samples = [
            RolloutSample(
                prompt=self.tokenizer.decode(rollout.prompt_ids), response=self.tokenizer.decode(rollout.response_ids),
                ground_truth=self.prompts[experience.groups[row]].record.ground_truth,
                reward=experience.rewards[row, 0].item(), finish_reason=rollout.finish_reason,
            )
            for row, rollout in enumerate(experience.rollouts[:: config.samples_per_prompt][: config.log_samples])
        ]  # fmt: skip
        log.write_samples(self.step, samples)

    def train_step(self) -> dict[str, float]:
        """Roll out, score, normalise, update; returns the step's metrics, equal on every rank.

        Raises:
            Interrupted: on every rank, before anything was changed, where a rank was asked to stop.
        """
        clock = _Clock()
        distributed.seed_everything(derived_seed(self.config.seed, self.step) % 2**31)
        self._leave_if_asked()
        experience = self._experience = self._collect()
        self._leave_if_asked()
        if self.config.rollout_sleep:
            self.engine.sleep()
            self._asleep = True
        metrics = _rollout_metrics(experience) | clock.lap("gen")

        batch = self._make_batch(experience)
        rows = self.config.mini_batch_prompts * self.config.samples_per_prompt
        # The first update computes its own: its weights are those that sampled.
        known_from = 0 if self.config.corrects_for_engine else rows
        batch.old_log_probs = torch.zeros(batch.tokens.shape)
        if known_from < len(batch):
            batch.old_log_probs[known_from:] = self._log_probs(batch.select(slice(known_from, None)))
        if self.config.corrects_for_engine:
            metrics |= self._mismatch(batch) | self._correct_for_the_engine(batch)
        metrics |= clock.lap("old_log_prob")
        if self.reference is not None:
            with self.reference.in_place():
                batch.reference_log_probs = self._log_probs(batch)
            metrics |= clock.lap("ref")

        updates = []
        for start in range(0, len(batch), rows):
            part = batch.select(slice(start, start + rows))
            if start < known_from:
                part.old_log_probs = None
            updates.append(self._update(part, (self.step * len(batch) + start) // rows))
            if start < known_from:
                assert part.old_log_probs is not None
                batch.old_log_probs[start : start + rows] = part.old_log_probs
        metrics |= {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        if known_from:
            metrics |= self._mismatch(batch)
        metrics |= clock.lap("update_actor")

        self.step += 1
        self.rounds += experience.rounds
        self._refresh_engine()
        metrics |= clock.lap("update_weights")
        seconds = clock.total()
        return metrics | {
            "timing_s/step": seconds,
            "perf/throughput": metrics["perf/total_num_tokens"] / seconds / self.world_size,
            "training/global_step": float(self.step),
            "training/epoch": float(self.rounds // self.collector.sampler.steps_per_epoch),
        }

    def _make_batch(self, experience: Experience) -> RolloutBatch:
        config = self.config
        advantages = group_advantages(experience.rewards, normalise_std=config.norm_adv_by_std)
        batch = make_batch(experience.rollouts, advantages.flatten(), pad_token_id=self.engine_pad_token)
        if config.overlong_filtering:
            cut = torch.tensor([rollout.finish_reason == "length" for rollout in experience.rollouts])
            batch.mask = batch.mask & ~cut.unsqueeze(1)
        return batch

    def _log_probs(self, batch: RolloutBatch) -> torch.Tensor:
        """``[B, s]`` log-probabilities of the rollouts under the model's weights, equal on every rank."""
        microbatches = self._microbatches(batch)
        return self._gather(batch, microbatches, self.policy.log_probs(microbatches))

    def _gather(
        self, batch: RolloutBatch, microbatches: list[PolicyMicrobatch], values: list[torch.Tensor]
    ) -> torch.Tensor:
        """``[B, s]``: per-token values of every data-parallel rank's microbatches."""
        result = torch.zeros(batch.tokens.shape)
        for microbatch, part in zip(microbatches, values, strict=True):
            batch.unpack(microbatch, part.cpu(), result)
        if group_size(self.groups.dp) > 1:  # the others' rows are zero here
            moved = result.to(self.device)
            dist.all_reduce(moved, group=self.groups.dp)
            result = moved.cpu()
        return result

    def _mismatch(self, batch: RolloutBatch) -> dict[str, float]:
        """How far the engine's log-probabilities are from the trainer's."""
        assert batch.old_log_probs is not None
        found = mismatch(batch.old_log_probs, batch.rollout_log_probs, batch.mask)
        return {
            f"training/rollout_{name}" if name.startswith("probs") else f"rollout/{name}": value
            for name, value in found.items()
        }

    def _correct_for_the_engine(self, batch: RolloutBatch) -> dict[str, float]:
        """Apply what is asked for against the mismatch between engine and trainer."""
        config = self.config
        assert batch.old_log_probs is not None
        pair, mask = (batch.old_log_probs, batch.rollout_log_probs), batch.mask
        metrics = {}
        if config.rollout_rs != "none":
            batch.mask = rejection_mask(*pair, mask, level=config.rollout_rs, threshold=config.rollout_rs_threshold)
            metrics["rollout/rs_masked_fraction"] = 1.0 - (batch.mask.sum() / mask.sum().clamp_min(1)).item()
        if config.rollout_is != "none":
            batch.importance = truncated_importance(
                *pair, batch.mask, level=config.rollout_is, threshold=config.rollout_is_threshold
            )
            chosen = batch.importance[batch.mask]
            metrics["rollout/is_mean"] = chosen.mean().item() if chosen.numel() else 1.0
            metrics["rollout/is_truncated_fraction"] = (
                (chosen >= config.rollout_is_threshold).float().mean().item() if chosen.numel() else 0.0
            )
        return metrics

    def _attach(self, config: OISDConfig) -> OISD:
        return OISD(
            config, self.training.chunks, tp_group=self.groups.tp, pp_group=self.groups.pp, dp_group=self.groups.dp,
            vocab_size=self.training.arguments.vocab_size,
        )  # fmt: skip

    def _accumulate(self, batch: RolloutBatch, number: int) -> tuple[dict[str, float], list[PolicyMicrobatch]]:
        """Put one mini-batch's gradients, and nothing else, into the buffers; GRPO's metrics and the microbatches."""
        config = self.config
        if config.loss_agg_mode != "token-mean":
            batch.weights = token_weights(
                batch.mask, config.loss_agg_mode, max_response_tokens=config.max_response_tokens
            )
        for chunk in self.training.chunks:
            chunk.train()
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.training.optimizer.zero_grad()  # after its step an fp32 parameter's grad is the buffer itself
        microbatches = self._microbatches(batch)
        losses = self.policy.gradients(
            microbatches,
            num_sequences=max(batch.num_sequences, 1),
            num_tokens=max(int(batch.mask.sum()), 1),
            step=number,
        )
        return losses, microbatches

    def _update(self, batch: RolloutBatch, number: int) -> dict[str, float]:
        """Optimizer step ``number`` of the run, on one mini-batch, which gets ``old_log_probs`` if it has none."""
        training, config = self.training, self.config
        losses, microbatches = self._accumulate(batch, number)
        if not math.isfinite(losses["loss"]):
            raise OISDError(
                f"the loss of step {self.step + 1} is {losses['loss']}: lower --lr (now {config.lr:g}) or check "
                "the checkpoint's weights for NaN; nothing was updated"
            )
        successful, grad_norm, _ = training.optimizer.step()
        if not successful or not math.isfinite(grad_norm):
            raise OISDError(
                f"the gradient norm of step {self.step + 1} is {grad_norm}: lower --lr (now {config.lr:g}); the "
                f"last checkpoint in {self.checkpoints} is unharmed"
            )
        training.scheduler.step(1)
        self.oisd.sync()
        if batch.old_log_probs is None:
            own = [part.old_log_probs for part in microbatches if part.old_log_probs is not None]
            batch.old_log_probs = self._gather(batch, microbatches, own)
        metrics = {f"actor/{name}": value for name, value in losses.items()}
        return metrics | {"actor/grad_norm": grad_norm, "actor/lr": _learning_rate(training)} | self.oisd.metrics()

    # ------------------------------------------------------------------------------------------- its parts

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.training.chunks[0].parameters()).device

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

    def _microbatches(self, batch: RolloutBatch) -> list[PolicyMicrobatch]:
        """This data-parallel rank's share of a batch."""
        config, dp = self.config, self.groups.dp
        plan = plan_microbatches(
            batch.lengths.tolist(), data_parallel=group_size(dp), micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens_per_microbatch, packed=config.sequence_packing,
        )  # fmt: skip
        return make_microbatches(
            batch, plan[0 if dp is None else dp.rank()], variable_length=config.variable_length,
            packed=config.sequence_packing, length_multiple=config.tp, device=self.device,
        )  # fmt: skip

    def _collect(self) -> Experience:
        """The step's rollouts; an engine that lost its weights, as a restarted server has, gets them again."""
        for _ in range(self.config.rollout_retries):
            try:
                return self.collector.collect(self.step, self.rounds)
            except StaleEngineError as error:
                if self.rank == 0:
                    warnings.warn(f"{error}; sending it the weights and sampling again", stacklevel=2)
                self._refresh_engine()
        return self.collector.collect(self.step, self.rounds)

    def _refresh_engine(self) -> None:
        """Stream the current weights into the engine; a collective, since every rank holds a part of them."""
        assert self.groups.tp is not None
        assert self.groups.pp is not None
        for attempt in range(self.config.rollout_retries + 1):
            tensors = export_hf_weights(
                self.training.chunks, self.training.arguments, tp_group=self.groups.tp, pp_group=self.groups.pp
            )
            failure: OISDError | None = None
            try:
                if self._asleep:
                    self.engine.wake()
                    self._asleep = False
                self.engine.update_weights(tensors, version=self.step)
            except OISDError as error:
                failure = error
            for _ in tensors:  # the other ranks wait for this one's part
                pass
            failures: list[tuple[str, bool] | None] = [None] * self.world_size
            dist.all_gather_object(failures, failure and (str(failure), isinstance(failure, ServerError)))
            found = [entry for entry in failures if entry is not None]
            if not found:
                return
            text, mendable = min(found, key=lambda entry: entry[1])
            if not mendable or attempt == self.config.rollout_retries:
                raise OISDError(text)
            if self.rank == 0:
                warnings.warn(f"{text}; refreshing again", stacklevel=2)

    def _leave_if_asked(self) -> None:
        if self.stop.agreed(self.device):
            raise Interrupted

    def save(self) -> None:
        """Write a checkpoint of the finished steps, unless there is one, and remove the oldest beyond
        ``keep_checkpoints`` and the rollouts that nothing can ask for any more."""
        if self.saved_step != self.step:
            save_model(
                self.training.chunks, self.checkpoints, self.step, self.training.arguments,
                hf_source=Path(self.config.load) / HF_DIRECTORY,
                extra_state=self.training.optimizer_state(
                    loading=False, fully_reshardable=self.config.dist_ckpt_optim_fully_reshardable
                ) | {"rounds": self.rounds, "layout": self._layout},
                manifest=True,
            )  # fmt: skip
            self.saved_step = self.step
        if self.rank == 0:
            for old in iterations(self.checkpoints)[: -self.config.keep_checkpoints]:
                shutil.rmtree(self.checkpoints / iteration_name(old), ignore_errors=True)
        if self.store is not None:
            self.store.discard(before=self.step)

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint of the run where asked to."""
        exists = (self.checkpoints / LATEST).is_file()
        if not self.config.resume:
            if exists:
                raise OISDError(
                    f"{self.output} already holds a run at step {latest_iteration(self.checkpoints)}: go on with "
                    "--resume or choose another --output"
                )
            return
        if not exists:
            return
        iteration = newest_whole_iteration(self.checkpoints)
        fully_reshardable = not self._optimizer_of_one_layout(iteration)
        if not fully_reshardable:
            saved = load_model([], self.checkpoints, iteration)["layout"]
            if saved != self._layout:
                layout = " x ".join(f"{name.upper()} {size}" for name, size in saved.items())
                raise OISDError(
                    f"the optimizer in {self.checkpoints} was saved at {layout} for that layout only "
                    "(--no-dist-ckpt-optim-fully-reshardable): resume with it"
                )
        template = self.training.optimizer_state(loading=True, fully_reshardable=fully_reshardable)
        state = load_model(self.training.chunks, self.checkpoints, iteration, extra_state=template)
        self.training.load_optimizer_state(state)
        self.oisd.sync()
        self.step = self.saved_step = int(state["iteration"])
        self.rounds = int(state["rounds"])

    @property
    def _layout(self) -> dict[str, int]:
        config = self.config
        layout = {"tp": config.tp, "pp": config.pp}
        if self.training.arguments.num_experts is not None:
            layout |= {"ep": config.ep, "etp": config.tp if config.etp is None else config.etp}
        return layout

    def _optimizer_of_one_layout(self, iteration: int) -> bool:
        """Whether a checkpoint holds a distributed optimizer in the form that only its own layout can load."""
        names = read_metadata(whole_iteration(self.checkpoints, iteration)).state_dict_metadata
        return any("optimizer.distributed.dp_group_idx" in name for name in names)


def _rollout_metrics(experience: Experience) -> dict[str, float]:
    rollouts, rewards = experience.rollouts, experience.rewards
    spread = rewards.amax(1) - rewards.amin(1)
    prompts, responses = ([float(len(getattr(r, name))) for r in rollouts] for name in ("prompt_ids", "response_ids"))
    return {
        **_range("critic/rewards", rewards.flatten().tolist()),
        "critic/rewards/std_in_group": rewards.std(dim=1, correction=0).mean().item(),
        "critic/degenerate_groups": (spread == 0).float().mean().item(),
        "rollout/rounds": float(experience.rounds),
        "rollout/sampled_groups": float(experience.sampled_groups),
        **_range("prompt_length", prompts),
        **_range("response_length", responses),
        "response_length/clip_ratio": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "perf/total_num_tokens": sum(prompts) + sum(responses),
    }


def _range(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/mean": sum(values) / len(values), f"{name}/max": max(values), f"{name}/min": min(values)}


def _learning_rate(training: Any) -> float:
    return float(training.optimizer.param_groups[0]["lr"]) if training.optimizer.param_groups else 0.0


class _Clock:
    """Wall seconds since the last lap."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return {f"timing_s/{name}": seconds}

    def total(self) -> float:
        return time.perf_counter() - self._start
