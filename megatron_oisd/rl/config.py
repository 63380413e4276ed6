"""The configuration of a training run; :mod:`.arguments` makes it from a command line and YAML files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.aggregate import AGGREGATIONS
from megatron_oisd.losses.grpo import KL_ESTIMATORS
from megatron_oisd.losses.off_policy import IMPORTANCE_LEVELS, REJECTION_LEVELS
from megatron_oisd.rl.policy import PolicyLossConfig


def _field(default: Any, help_text: str, *, megatron: str | None = None) -> Any:
    """``megatron`` is the name of the same thing among Megatron-LM's arguments, accepted as well."""
    return field(default=default, metadata={"help": help_text, "megatron": megatron})


ROLLOUT_ENGINES = ("transformers", "vllm", "vllm_in_process", "vllm_server")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One GRPO (+ OISD) run. The defaults of the algorithm follow the paper's recipe; see ``docs/paper_map.md``.

    Raises:
        OISDError: a value is out of range or two do not go together.
    """

    load: str = _field("", "Megatron checkpoint directory to start from (tools/convert_hf_to_mcore.py makes one)")
    data: str = _field("", "training prompts, .parquet or .jsonl")
    output: str = _field("", "directory of the run: checkpoints, metrics, TensorBoard events")
    resume: bool = _field(False, "go on from the newest checkpoint in the output directory")

    tp: int = _field(1, "tensor-model-parallel size", megatron="tensor_model_parallel_size")
    pp: int = _field(1, "pipeline-model-parallel size", megatron="pipeline_model_parallel_size")
    ep: int = _field(
        1,
        "expert-model-parallel size: ranks, of those of TP and DP, that share out a layer's experts",
        megatron="expert_model_parallel_size",
    )
    etp: int | None = _field(
        None,
        "tensor-parallel size within an expert; default: that of the rest of the model",
        megatron="expert_tensor_parallel_size",
    )
    sequence_parallel: bool = _field(False, "shard activations along the sequence between tensor-parallel regions")
    use_distributed_optimizer: bool = _field(False, "shard optimizer state over data-parallel ranks")
    dist_ckpt_optim_fully_reshardable: bool = _field(
        True, "save a distributed optimizer so that it loads at any layout; off: faster, same TP and PP only"
    )
    bf16: bool = _field(False, "bf16 weights with fp32 gradients and optimizer; default: fp32")
    recompute: str = _field(
        "none", "activation recomputation: none, selective or full", megatron="recompute_granularity"
    )

    num_steps: int = _field(300, "rollout steps")
    prompts_per_step: int = _field(128, "prompts per rollout step", megatron="grpo_prompts_per_step")
    samples_per_prompt: int = _field(8, "rollouts per prompt (the GRPO group)", megatron="grpo_group_size")
    mini_batch_prompts: int = _field(32, "prompts per optimizer step")
    micro_batch_size: int = _field(1, "sequences per pipeline microbatch; not used with a token budget")
    max_tokens_per_microbatch: int | None = _field(
        None, "token budget of a microbatch, padding included: sequences of like length come together"
    )
    sequence_packing: bool = _field(
        False,
        "pack the sequences of a microbatch without padding (THD; needs a token budget, and TE on GPUs)",
        megatron="rl_use_sequence_packing",
    )
    max_prompt_tokens: int = _field(1024, "longer prompts are dropped")
    max_response_tokens: int = _field(8192, "responses are cut there")
    temperature: float = _field(1.0, "sampling temperature", megatron="rl_default_temperature")
    top_p: float = _field(1.0, "nucleus sampling mass", megatron="rl_default_top_p")
    reward: str = _field("exact_match", "reward rule: exact_match or math_verify")
    system_prompt: str | None = _field(None, "system message for prompts that have none")
    dynamic_sampling: bool = _field(False, "replace groups of equal rewards by those of further prompts")
    dynamic_sampling_max_rounds: int = _field(10, "rounds of prompts that dynamic sampling may draw in a step")
    durable_rollouts: bool = _field(True, "keep rollouts on disk until a checkpoint is written")
    limit_prompts: int | None = _field(None, "use only the first N prompts of the data")

    rollout_engine: str = _field(
        "transformers",
        "who samples: transformers; vllm (a process of its own for each rank); vllm_in_process; vllm_server (HTTP)",
    )
    rollout_urls: str = _field("", "vllm_server: URLs of the servers, comma-separated; ranks are spread over them")
    rollout_timeout_s: float = _field(600.0, "seconds that an engine may take for one response or one refresh")
    rollout_retries: int = _field(5, "further attempts after a failed request to a server, or a stale engine")
    rollout_weights_host: str = _field("127.0.0.1", "address of this machine from which servers fetch weights")
    rollout_gpu_memory_utilization: float = _field(0.4, "share of the GPU's memory that vLLM in the job takes")
    rollout_sleep: bool = _field(False, "free the engine's GPU memory during the update")

    lr: float = _field(1e-6, "learning rate, constant after the warm-up")
    lr_warmup_steps: int = _field(0, "optimizer steps of linear warm-up", megatron="lr_warmup_iters")
    weight_decay: float = _field(0.01, "AdamW weight decay")
    adam_beta1: float = _field(0.9, "AdamW beta 1")
    adam_beta2: float = _field(0.999, "AdamW beta 2")
    clip_grad: float = _field(1.0, "gradient norm clip")

    clip_low: float = _field(0.2, "GRPO ratio clip below 1", megatron="grpo_clamp_eps_lower")
    clip_high: float = _field(0.2, "GRPO ratio clip above 1", megatron="grpo_clamp_eps_upper")
    dual_clip: float = _field(10.0, "bound of the loss for negative advantages, in advantages; inf: none")
    loss_agg_mode: str = _field(
        "token-mean", "token-mean, seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm (Dr. GRPO)"
    )
    norm_adv_by_std: bool = _field(True, "divide advantages by their group's standard deviation; Dr. GRPO: off")
    kl_loss_coef: float = _field(0.0, "weight of the KL to the model of --load; 0: none", megatron="grpo_kl_beta")
    kl_loss_type: str = _field("k3", "estimator of that KL: k1, k2 or k3")
    entropy_coeff: float = _field(0.0, "weight of the entropy bonus", megatron="grpo_entropy_term_weight")
    overlong_filtering: bool = _field(False, "do not train on responses cut at the limit (DAPO)")
    rollout_is: str = _field("none", "truncated importance sampling against the engine: none, token or sequence")
    rollout_is_threshold: float = _field(
        2.0, "largest importance weight", megatron="rl_importance_sampling_truncation_coef"
    )
    rollout_rs: str = _field("none", "leave out what the engine sampled too differently: none, token or geometric")
    rollout_rs_threshold: float = _field(2.0, "largest ratio of probabilities, either way, that is kept")

    save_interval: int = _field(50, "rollout steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = _field(2, "newest checkpoints kept")
    log_samples: int = _field(4, "rollouts written as text at a time; 0: none")
    log_samples_interval: int = _field(10, "steps between them")
    wandb_project: str = _field("", "Weights & Biases project; empty: no W&B")
    wandb_name: str = _field(
        "", "name of the run there; empty: that of the output directory", megatron="wandb_exp_name"
    )
    wandb_mode: str = _field("offline", "online, or offline: files to be sent with wandb sync")
    seed: int = _field(1234, "seed of sampling, data order and initialisation")

    def __post_init__(self) -> None:
        for name, what in (
            ("load", "a Megatron checkpoint directory"),
            ("data", "a prompt file"),
            ("output", "a run directory"),
        ):
            if not getattr(self, name):
                raise OISDError(f"--{name} is missing: expected {what}")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            least = 0 if item.name in ("lr_warmup_steps", "seed", "rollout_retries", "log_samples") else 1
            if type(value) is int and value < least:
                raise OISDError(f"{flag(item.name)} is {value}: expected an integer of at least {least}")
        for name in ("temperature", "lr", "clip_grad", "rollout_timeout_s"):
            if not getattr(self, name) > 0:
                raise OISDError(f"{flag(name)} is {getattr(self, name)}: expected a number above 0")
        if not 0 < self.top_p <= 1:
            raise OISDError(f"--top-p is {self.top_p}: expected a number above 0 and at most 1")
        if self.recompute not in ("none", "selective", "full"):
            raise OISDError(f"--recompute is {self.recompute!r}: expected none, selective or full")
        for name, allowed in (
            ("loss_agg_mode", AGGREGATIONS), ("kl_loss_type", KL_ESTIMATORS), ("rollout_is", IMPORTANCE_LEVELS),
            ("rollout_rs", REJECTION_LEVELS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise OISDError(f"{flag(name)} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in ("kl_loss_coef", "entropy_coeff"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise OISDError(f"{flag(name)} is {getattr(self, name)}: expected a finite number of at least 0")
        for name in ("rollout_is_threshold", "rollout_rs_threshold", "dual_clip"):
            if not getattr(self, name) > 1:
                raise OISDError(f"{flag(name)} is {getattr(self, name)}: expected a number above 1")
        if self.wandb_mode not in ("online", "offline"):
            raise OISDError(f"--wandb-mode is {self.wandb_mode!r}: expected online or offline")
        if self.sequence_packing and self.max_tokens_per_microbatch is None:
            raise OISDError("--sequence-packing needs --max-tokens-per-microbatch: how much goes into one microbatch")
        if self.rollout_engine not in ROLLOUT_ENGINES:
            raise OISDError(
                f"--rollout-engine is {self.rollout_engine!r}: expected one of {', '.join(ROLLOUT_ENGINES)}"
            )
        if (self.rollout_engine == "vllm_server") != bool(self.server_urls):
            raise OISDError(
                f"--rollout-urls is {self.rollout_urls!r} with --rollout-engine {self.rollout_engine}: give the URLs "
                "of running servers with vllm_server, and none otherwise"
            )
        if not 0 < self.rollout_gpu_memory_utilization <= 1:
            raise OISDError(
                f"--rollout-gpu-memory-utilization is {self.rollout_gpu_memory_utilization}: expected a share of 0 to 1"
            )
        if self.prompts_per_step % self.mini_batch_prompts:
            raise OISDError(
                f"--prompts-per-step is {self.prompts_per_step} and --mini-batch-prompts {self.mini_batch_prompts} "
                "does not divide it: choose a divisor, so that every optimizer step sees as many prompts"
            )
        if self.sequence_parallel and self.tp == 1:
            raise OISDError("--sequence-parallel needs --tp of at least 2: it shards between tensor-parallel ranks")

    def check_data_parallel(self, data_parallel: int) -> None:
        """Raise :class:`OISDError` unless a mini-batch splits evenly over the data-parallel ranks' microbatches."""
        sequences = self.mini_batch_prompts * self.samples_per_prompt
        if self.max_tokens_per_microbatch is not None:
            if sequences < data_parallel:
                raise OISDError(
                    f"a mini-batch of {sequences} sequences leaves some of {data_parallel} data-parallel ranks without "
                    "any: raise --mini-batch-prompts"
                )
            return
        if sequences % (data_parallel * self.micro_batch_size):
            raise OISDError(
                f"a mini-batch of {sequences} sequences (--mini-batch-prompts x --samples-per-prompt) does not split "
                f"into microbatches of {self.micro_batch_size} on {data_parallel} data-parallel ranks: change "
                "--micro-batch-size or the mini-batch"
            )

    @property
    def server_urls(self) -> list[str]:
        """The rollout servers."""
        return [url.strip() for url in self.rollout_urls.split(",") if url.strip()]

    @property
    def policy_loss(self) -> PolicyLossConfig:
        """GRPO's part of the configuration."""
        return PolicyLossConfig(
            clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip, temperature=self.temperature,
            kl_coefficient=self.kl_loss_coef, kl_estimator=self.kl_loss_type, entropy_coefficient=self.entropy_coeff,
        )  # fmt: skip

    @property
    def corrects_for_engine(self) -> bool:
        """Whether the update depends on how far the engine's log-probabilities are from the trainer's."""
        return self.rollout_is != "none" or self.rollout_rs != "none"

    @property
    def variable_length(self) -> bool:
        """Whether microbatches differ in shape."""
        return self.max_tokens_per_microbatch is not None


NOT_OF_THE_TRAJECTORY = frozenset(
    (
        *("output", "resume", "tp", "pp", "ep", "etp", "sequence_parallel", "use_distributed_optimizer", "recompute"),
        "num_steps",
        *("micro_batch_size", "max_tokens_per_microbatch", "sequence_packing"),
        *("save_interval", "keep_checkpoints", "durable_rollouts"),
        *("dist_ckpt_optim_fully_reshardable", "rollout_urls", "rollout_timeout_s", "rollout_retries"),
        *("log_samples", "log_samples_interval", "wandb_project", "wandb_name", "wandb_mode"),
        *("rollout_weights_host", "rollout_gpu_memory_utilization", "rollout_sleep"),
    )
)
"""Fields that a resumed run may change and yet follow the same trajectory (up to rounding)."""


def trajectory_fingerprint(config: TrainConfig, oisd_config: OISDConfig) -> str:
    """A hash of all fields that decide which trajectory a run follows."""
    fields = dataclasses.asdict(config)
    relevant = {name: value for name, value in fields.items() if name not in NOT_OF_THE_TRAJECTORY}
    text = repr((sorted(relevant.items()), sorted(dataclasses.asdict(oisd_config).items())))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")
