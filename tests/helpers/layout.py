"""One optimizer step's loss and gradients on any parallel layout, and the same from the float64 reference.

The trained path is the real one: ``PolicyPass`` (the trainer's own), Megatron's schedules, DistributedDataParallel,
``finalize_model_grads``. Gradients are read from DDP's buffers and brought to HF names by the weight export.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from tests.helpers.mcore_run import gather_shards

NUM_LAYERS = 4
VOCAB = 150  # not a multiple of 128: padded rows take part in every test


@dataclass(frozen=True)
class Case:
    """A layout and what is computed on it."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int | None = None
    sequence_parallel: bool = False
    micro_batch: int = 1
    oisd: OISDConfig | None = field(default_factory=lambda: OISDConfig(layers=(2,), attn_window=3, attn_global_keys=3))
    tied: bool = True
    per_token_loss: bool = True
    dtype: torch.dtype = torch.float32
    overrides: tuple[tuple[str, Any], ...] = ()
    distributed_optimizer: bool = False
    max_tokens: int | None = None
    """Token budget of a microbatch instead of ``micro_batch`` sequences."""
    packed: bool = False
    policy: tuple[tuple[str, Any], ...] = ()
    """Fields of ``PolicyLossConfig``."""
    loss_agg_mode: str = "token-mean"
    counts: bool = True
    """Whether the step is told the global batch's counts of sequences and tokens."""

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        parts = [f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}"]
        parts += [f"vpp{self.vpp}"] if self.vpp else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"mbs{self.micro_batch}", "tied" if self.tied else "untied"]
        if self.oisd is None:
            parts.append("grpo")
        else:
            parts.append("layers" + "-".join(map(str, self.oisd.layers)))
            parts += [] if self.oisd.head_gradient else ["nohead"]
            parts += [] if self.oisd.aggregation == "sequence" else ["token"]
            parts += [] if self.oisd.advantage_weighting == "signed" else [self.oisd.advantage_weighting]
            if not self.oisd.enabled:
                parts.append("lambda0")
        parts += [] if self.per_token_loss else ["meanloss"]
        parts += [f"budget{self.max_tokens}"] if self.max_tokens else []
        parts += ["packed"] if self.packed else []
        parts += [self.loss_agg_mode] if self.loss_agg_mode != "token-mean" else []
        parts += [f"{name}{value}" for name, value in self.policy]
        parts += [] if self.counts else ["nocounts"]
        parts += ["distopt"] if self.distributed_optimizer else []
        parts += [str(value) for _, value in self.overrides]
        return "-".join(parts)


def hf_model(tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Qwen3 with weights large enough that layers, heads and tokens really differ."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, tie_word_embeddings=tied, rope_theta=10000.0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


@dataclass
class Batch:
    """A global batch of rollouts; positions as everywhere: t speaks of the prediction of token t + 1."""

    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None
    """None: of the model itself."""
    reference_log_probs: Tensor | None = None
    importance: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence: what comes after the last response token is padding."""
        return torch.tensor([int(row.nonzero().max()) + 2 if row.any() else 4 for row in self.mask])


def make_batch(num_sequences: int = 4, length: int = 24) -> Batch:
    """Ragged responses, advantages of both signs, one clipped and one exactly zero, ratios off 1."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, VOCAB, (num_sequences, length), generator=generator)
    mask = torch.zeros(num_sequences, length, dtype=torch.bool)
    for row in range(num_sequences):
        mask[row, 3 + row : 12 + 3 * row] = True
    mask[:, -1] = False
    advantages = torch.tensor([0.7, -1.6, 0.0, 0.4, -0.3, 1.2, 0.9, -0.5])[:num_sequences]
    old = -5.0 + 0.1 * torch.randn(num_sequences, length, generator=generator)
    return Batch(tokens, mask, advantages, old)


def reference(case: Case, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of the float64 dense reference, in one process."""
    from megatron_oisd.losses import reference as ref

    assert batch.old_log_probs is not None
    model = ref.prepare_model(hf_model(case.tied))
    oisd = case.oisd or OISDConfig(layers=(1,), lambda_think=0.0, lambda_attn=0.0)
    losses = ref.oisd_loss(
        model, tokens=batch.tokens, mask=batch.mask, advantages=batch.advantages.double(),
        old_log_probs=batch.old_log_probs.double(), layers=oisd.layers, lambda_think=oisd.lambda_think,
        lambda_attn=oisd.lambda_attn, temperature=oisd.temperature, advantage_clip=oisd.advantage_clip,
        advantage_weighting=oisd.advantage_weighting,
        window=oisd.attn_window, num_global=oisd.attn_global_keys, query_mask=query_mask(oisd, batch),
        head_gradient=oisd.head_gradient, aggregation=_aggregation(case, oisd),
        # Without per-token loss Megatron means over microbatches of means over tokens: per sequence at batch 1.
        grpo_aggregation="token" if case.per_token_loss else "sequence",
    )  # fmt: skip
    losses.total.backward()
    values = {"loss": losses.grpo.item()} if case.per_token_loss else {}
    if oisd.enabled:
        values |= {f"oisd/think/layer_{n}": v.item() for n, v in losses.think.items() if oisd.lambda_think}
        values |= {f"oisd/attn/layer_{n}": v.item() for n, v in losses.attn.items() if oisd.lambda_attn}
    return values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _aggregation(case: Case, oisd: OISDConfig) -> str:
    """Without counts and per-token loss, microbatches of one sequence make every mean a mean over sequences."""
    assert case.counts or case.per_token_loss or case.micro_batch == 1
    return oisd.aggregation if case.counts or case.per_token_loss else "sequence"


def query_mask(oisd: OISDConfig, batch: Batch) -> Tensor:
    from megatron_oisd.losses.attention import sample_query_positions

    return sample_query_positions(
        batch.mask, num_queries=oisd.attn_queries, seed=oisd.seed, step=0, sequence_ids=list(range(len(batch.tokens)))
    )


def run_case(case: Case, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Called on every rank: losses (equal on all) and gradients under HF names (whole, on all)."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megatron_oisd.convert.families import arguments_from_hf_config
    from megatron_oisd.convert.weights import export_hf_weights, load_hf_weights
    from megatron_oisd.losses.aggregate import token_weights
    from megatron_oisd.pipeline.oisd import OISD
    from megatron_oisd.rl.batch import RolloutBatch, make_microbatches, plan_microbatches
    from megatron_oisd.rl.policy import ParallelGroups, PolicyLossConfig, PolicyPass
    from megatron_oisd.runtime import distributed
    from megatron_oisd.runtime.model import build_model, transformer_config

    distributed.initialize(tensor_parallel=case.tp, pipeline_parallel=case.pp, virtual_pipeline=case.vpp)
    try:
        hf = hf_model(case.tied)
        arguments = arguments_from_hf_config(hf.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
        config = transformer_config(
            arguments, tensor_parallel=case.tp, pipeline_parallel=case.pp, virtual_pipeline=case.vpp,
            sequence_parallel=case.sequence_parallel, dtype=case.dtype,
            calculate_per_token_loss=case.per_token_loss, finalize_model_grads_func=finalize_model_grads,
            **dict(case.overrides) | ({} if case.max_tokens is None else {"variable_seq_lengths": True}),
        )  # fmt: skip
        bare = build_model(arguments, config, packed=case.packed)
        load_hf_weights(bare, arguments, {n: p.detach() for n, p in hf.state_dict().items()})
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=case.dtype != torch.float64, overlap_grad_reduce=False,
            use_distributed_optimizer=case.distributed_optimizer,
        )  # fmt: skip
        chunks = [DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk) for chunk in bare]
        for chunk in chunks:
            chunk.zero_grad_buffer()
            chunk.train()
        groups = ParallelGroups.from_megatron()
        oisd = None
        if case.oisd is not None:
            oisd = OISD(case.oisd, chunks, tp_group=groups.tp, pp_group=groups.pp, dp_group=groups.dp, vocab_size=VOCAB)
        policy = PolicyPass(chunks, config, oisd, PolicyLossConfig(**dict(case.policy)), groups, VOCAB)
        assert groups.dp is not None
        rollouts = RolloutBatch(
            batch.tokens, batch.mask, torch.zeros(batch.mask.shape), batch.advantages, batch.lengths,
            old_log_probs=batch.old_log_probs, reference_log_probs=batch.reference_log_probs,
            importance=batch.importance,
        )  # fmt: skip
        if case.loss_agg_mode != "token-mean":
            rollouts.weights = token_weights(batch.mask, case.loss_agg_mode, max_response_tokens=40)
        plan = plan_microbatches(
            batch.lengths.tolist(), data_parallel=case.dp, micro_batch_size=case.micro_batch,
            max_tokens=case.max_tokens, packed=case.packed,
        )[groups.dp.rank()]  # fmt: skip
        microbatches = make_microbatches(
            rollouts, plan, variable_length=case.max_tokens is not None, packed=case.packed,
            length_multiple=case.tp, device=torch.device("cpu"),
        )  # fmt: skip
        metrics = policy.gradients(
            microbatches,
            num_sequences=len(batch.tokens) if case.counts else None,
            num_tokens=int(batch.mask.sum()) if case.counts else None,
        )
        values = {"loss": metrics["loss"]} if case.per_token_loss else {}
        if oisd is not None:
            values |= {k: v for k, v in oisd.metrics().items() if k.startswith(("oisd/think/", "oisd/attn/"))}
            oisd.detach()
        with torch.no_grad():
            for chunk in chunks:
                if case.distributed_optimizer:
                    gather_shards(chunk)
                for parameter in chunk.parameters():
                    parameter.data = parameter.main_grad.detach().clone()
        gradients = dict(export_hf_weights(chunks, arguments, tp_group=groups.tp, pp_group=groups.pp))
        return values, gradients
    finally:
        distributed.shutdown()


def largest_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest ``max|difference| / max|expected|`` over all parameters, and the parameter's name."""
    assert gradients.keys() == expected.keys()
    errors = {}
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        errors[name] = ((gradients[name].double() - gradient).abs().max() / scale).item()
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst
