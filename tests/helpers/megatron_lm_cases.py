"""What ``train_rl.py`` and OISD give on a layout, and the same from a dense float64 reference.

On the layout everything of the update is Megatron-LM's own: ``train_step``, ``train_rl.forward_step``,
``calculate_grpo_loss``, ``loss_func``, its schedules, its packing, DistributedDataParallel, ``finalize_model_grads``.
The model is that of ``mcore.py`` in fp32: bf16 would hide small errors. The reference (``DenseLosses`` of ``mcore.py``)
writes Megatron-LM's policy loss anew.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.mcore import LENGTH, PADDED, Layout, Rollouts, build_chunks, fill, make_rollouts, pieces, transformer
from tests.helpers.mcore_reference import DenseLosses
from tests.helpers.mcore_run import Outcome, parallel_world


@dataclass(frozen=True)
class Case:
    """A layout and how the rollouts reach ``train_rl.py``."""

    layout: Layout
    """Its ``packed`` means Megatron-LM's sequence packing here."""
    bin_size: int = 48
    """Positions of a bin."""
    empty_bins: int = 0
    """Bins that Megatron-LM adds to give every data-parallel rank as many."""
    kl_beta: float = 0.0
    entropy_weight: float = 0.0
    correction: bool = False
    """Importance sampling correction by the inference engine's log-probabilities."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What the reference depends on."""
        return (*self.layout.key, self.empty_bins, self.kl_beta, self.entropy_weight, self.correction)


def other_log_probs(batch: Rollouts) -> tuple[Tensor, Tensor]:
    """Those of the reference policy and of the inference engine, ``[B, s]``."""
    generator = torch.Generator().manual_seed(17)
    shape = batch.old_log_probs.shape
    return tuple(batch.old_log_probs + 0.2 * torch.randn(shape, generator=generator) for _ in range(2))  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------- reference


class MegatronLosses(DenseLosses):
    """GRPO as Megatron-LM computes it: over the padded vocabulary, with KL, entropy term and correction."""

    def __init__(self, model: Any, case: Case, batch: Rollouts) -> None:
        super().__init__(model, case.layout, batch)
        self.case = case
        self.reference, self.inference = other_log_probs(batch)

    @property
    def loss_tokens(self) -> float:
        return super().loss_tokens + self.case.empty_bins  # Megatron-LM counts an empty bin as one token

    def log_probs(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, targets.unsqueeze(1)).squeeze(1)

    def policy_loss(self, row: int, log_probs: Tensor, advantage: Tensor) -> Tensor:
        old = self.batch.old_log_probs[row].double()
        ratio = (log_probs - old).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        if self.case.correction:
            surrogate = surrogate * (old - self.inference[row].double()).exp().clamp(max=1.1)
        apart = self.reference[row].double() - log_probs
        entropy = -log_probs.exp() * log_probs
        return -surrogate + self.case.kl_beta * (apart.exp() - apart - 1) - self.case.entropy_weight * entropy


def run_reference(case: Case) -> Outcome:
    """Called on one rank, without Megatron-LM."""
    layout = case.layout
    alone = Layout("reference", model=layout.model, tied=layout.tied, oisd=layout.oisd, dtype=torch.float64)
    with parallel_world(alone):
        (model,) = build_chunks(alone, transformer(alone))
        fill([model])
        model.train()
        dense = MegatronLosses(model, case, make_rollouts())
        values = dense.backward()
        return Outcome(values.pop("loss") / dense.loss_tokens, values, pieces([model]))


# ---------------------------------------------------------------------------------------------------------- Megatron-LM


class HalfInNameOnly(nn.Module):
    """Takes the argument that Megatron's ``Float16Module`` takes, and leaves the model in fp32."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.config = module, module.config

    def set_input_tensor(self, tensor: Any) -> None:
        self.module.set_input_tensor(tensor)

    def forward(self, *args: Any, fp32_output: bool = True, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class NoOptimizer:
    """Leaves the weights, so that the gradients stay what they are."""

    def zero_grad(self) -> None:
        pass

    def step(self, *args: Any, **kwargs: Any) -> tuple[bool, float, None]:
        self.increment = kwargs.get("increment")
        return True, 0.0, None


def initialise(arguments: list[str]) -> None:
    """Start Megatron-LM as ``pretrain`` does."""
    from megatron.training import arguments as megatron_arguments
    from megatron.training import training

    sys.argv = ["train_rl.py", *arguments]
    if hasattr(megatron_arguments, "parse_and_validate_args"):
        megatron_arguments.parse_and_validate_args()
    training.initialize_megatron()


def parse_for_8_ranks(arguments: list[str]) -> dict[str, Any]:
    """Megatron-LM's parsing and checks, and ours, as the first of 8 ranks; what they make of some arguments."""
    from megatron.training import arguments as megatron_arguments

    from megatron_oisd.integrations.megatron_lm import check_arguments, install

    os.environ["WORLD_SIZE"] = "8"
    loop = install()
    sys.argv = ["train_rl.py", *arguments]
    args = megatron_arguments.parse_args()
    megatron_arguments.validate_args(args, {})
    check_arguments(args)
    names = ("data_parallel_size", "micro_batch_size", "rl_use_sequence_packing", "tokenizer_model")
    found = {name: getattr(args, name) for name in (*names, "pretrained_checkpoint")}
    return found | {"layers": loop.config.layers}


def run_cases(arguments: list[str], cases: list[Case]) -> list[Outcome]:
    """Called on every rank: the gradients of one update in every case; all have the same parallel sizes."""
    from megatron_oisd.integrations.megatron_lm import install

    loop = install()
    initialise(arguments)
    return [run_case(loop, case) for case in cases]


def run_case(loop: Any, case: Case) -> Outcome:
    import train_rl
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import get_args, training

    layout, batch, args = case.layout, make_rollouts(), get_args()
    args.rl_use_sequence_packing = layout.packed
    args.seq_length = args.decoder_seq_length = case.bin_size if layout.packed else LENGTH
    args.padded_vocab_size, args.calculate_per_token_loss = PADDED, layout.per_token_loss
    args.grpo_kl_beta, args.grpo_entropy_term_weight = case.kl_beta, case.entropy_weight
    args.rl_inference_logprobs_is_correction = case.correction
    args.rl_importance_sampling_truncation_coef = 1.1 if case.correction else None

    config = transformer(layout)
    bare = build_chunks(Layout(layout.name, packed=True, tied=layout.tied), config)
    fill(bare)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **dict(layout.ddp))
    chunks = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=HalfInNameOnly(chunk)) for chunk in bare
    ]
    for chunk in chunks:
        chunk.train()
    loop.config = layout.oisd
    before = _log_probs(chunks[0], batch)
    if layout.oisd is not None and layout.oisd.enabled:
        loop.attach(chunks)
    # A log-probability pass on a model with taps is the one without.
    silent = before is None or torch.equal(before, _log_probs(chunks[0], batch))

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    microbatches = _packed(batch, case) if layout.packed else _rows(batch)[rank::size]
    training.get_num_microbatches = lambda: len(microbatches)
    losses, *_ = training.train_step(
        train_rl.forward_step, RerunDataIterator(iter(microbatches)), chunks, NoOptimizer(), NoOptimizer(), config,
        get_forward_backward_func(), iteration=0,
    )  # fmt: skip
    metrics = {name: float(value) for name, value in losses.items()}
    if loop.oisd is not None:
        loop.oisd.detach()
        loop.oisd = None
    return Outcome(metrics.pop("lm loss", 0.0), metrics, pieces(bare), {"silent": silent})


def _log_probs(chunk: Any, batch: Rollouts) -> Tensor | None:
    """Megatron-LM's pass for old log-probabilities; None where that takes other stages."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.rl.rl_utils import get_logprobs

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return None
    borders = torch.tensor([0, LENGTH], dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH
    )
    return get_logprobs(
        chunk, batch.tokens[:1], torch.arange(LENGTH).unsqueeze(0), no_grad=True, packed_seq_params=params
    )


def _rows(batch: Rollouts) -> list[tuple[Tensor, ...]]:
    """As the loader of unpacked rollouts gives them."""
    reference, inference = other_log_probs(batch)
    mask = torch.nn.functional.pad(batch.mask.float(), (1, 0))[:, :-1]
    positions = torch.arange(LENGTH).expand(batch.tokens.shape)
    parts = (
        batch.tokens, batch.advantages, batch.old_log_probs[:, :-1], mask, positions, reference[:, :-1],
        inference[:, :-1],
    )  # fmt: skip
    return [tuple(part[row : row + 1] for part in parts) for row in range(len(batch.tokens))]


def _packed(batch: Rollouts, case: Case) -> list[tuple[Tensor]]:
    """Pack with Megatron-LM's own packer and put its context where ``train_rl.forward_step`` looks for it."""
    from megatron.core import parallel_state
    from megatron.rl import rl_utils, sequence_packing_utils
    from megatron.training import get_tokenizer

    lengths = torch.tensor(batch.lengths).unsqueeze(1)
    padding = torch.arange(LENGTH) >= lengths
    tokens = torch.nn.functional.pad(
        batch.tokens.masked_fill(padding, get_tokenizer().pad), (0, case.bin_size - LENGTH), value=get_tokenizer().pad
    )
    generated = torch.nn.functional.pad(batch.mask, (1, case.bin_size - LENGTH - 1))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = slice(rank * len(tokens) // size, (rank + 1) * len(tokens) // size)
    context = sequence_packing_utils.pack_all_trajectories(
        tokens[mine], generated[mine], None, batch.advantages, case.bin_size, 16, "fifo"
    )
    reference, inference = other_log_probs(batch)
    # The log-probabilities as passes over the bins would give them.
    for name, whole in (
        ("old_logprobs", batch.old_log_probs), ("ref_logprobs", reference), ("packed_inference_logprobs", inference),
    ):  # fmt: skip
        packed = torch.zeros(len(context.packed_trajs), case.bin_size - 1)
        for number, sequences in enumerate(context.packing_info.bin_seq_indices):
            starts = context.packing_info.seq_starts[number]
            for start, sequence in zip(starts, sequences, strict=False):
                length = context.packing_info.seq_lengths[sequence]
                assert length == batch.lengths[sequence]
                packed[number, start : start + length - 1] = whole[sequence, : length - 1]
        setattr(context, name, packed)
    rl_utils.get_rl_runtime_state().packing_context = context
    bins = [(torch.tensor(number),) for number in range(len(context.packed_trajs))]
    counts = torch.tensor([len(bins), sum(not found for found in context.packing_info.bin_seq_indices)])
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    assert counts[1] == case.empty_bins, f"{counts[1]} of {counts[0]} bins are empty, expected {case.empty_bins}"
    return bins
