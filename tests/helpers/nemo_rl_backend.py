"""NeMo RL's Megatron training functions as modules: its own from a checkout, or a stand-in with the same names.

NeMo RL itself needs Python 3.13, Ray and Megatron-Bridge to be imported; these functions do not. What they use of the
rest is replaced here: the loss post-processor, hidden state capture, activation offloading.
"""

from __future__ import annotations

import ast
import sys
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from tests.helpers.mcore import LENGTH, VOCAB, Layout, Rollouts, make_rollouts, pieces
from tests.helpers.mcore_run import Outcome, parallel_world, start

TRAIN, WORKER = "nemo_rl.models.megatron.train", "nemo_rl.models.policy.workers.megatron_policy_worker"
FROM_NEMO_RL = (
    "model_forward", "apply_temperature_scaling", "forward_with_post_processing_fn", "megatron_forward_backward"
)  # fmt: skip


class Batch(dict):  # type: ignore[type-arg]
    """A ``BatchedDataDict`` without images."""

    def get_multimodal_dict(self, **options: Any) -> dict[str, Any]:
        return {}


class LossPostProcessor:
    """GRPO of ``mcore_run.py``, divided by the global tokens, Megatron's averaging undone, as in NeMo RL."""

    def __init__(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches

    def __call__(
        self, *, data_dict: Any, packed_seq_params: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> Any:
        def loss_func(logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
            from megatron.core import parallel_state

            from megatron_oisd.losses import grpo
            from megatron_oisd.losses.numerics import valid_columns

            group, width = parallel_state.get_tensor_model_parallel_group(), logits.shape[-1]
            terms = []
            for row in range(len(data_dict["input_ids"])):
                token = data_dict["token_mask"][row].nonzero().flatten()
                where, line = token - 1, row
                if packed_seq_params is not None:
                    where, line = where + packed_seq_params.cu_seqlens_q[row], 0
                log_probs = grpo.vocab_parallel_log_probs(
                    logits[line, where], data_dict["input_ids"][row, token], group=group,
                    first_token=group.rank() * width, valid_columns=valid_columns(VOCAB, group.rank(), width),
                ).log_probs  # fmt: skip
                old, weights = data_dict["prev_logprobs"][row, token], data_dict["advantages"][row, token]
                terms.append(grpo.policy_loss(log_probs, old, weights).loss.sum())
            return torch.stack(terms).sum() / global_valid_toks * self.num_microbatches, {}

        return loss_func


def modules(checkout: str) -> types.ModuleType:
    """Put both modules in their places; ``checkout`` empty: the stand-in. Returns the worker's."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    train, worker = types.ModuleType(TRAIN), types.ModuleType(WORKER)
    vars(train).update(
        torch=torch, partial=partial, nullcontext=nullcontext, get_forward_backward_func=get_forward_backward_func,
        LossPostProcessor=LossPostProcessor, LogprobsPostProcessor=type("Other", (), {}),
        TopkLogitsPostProcessor=type("Another", (), {}), get_capture_context=lambda *args: (nullcontext(), None),
        suspend_activation_offload_for_forward_only=lambda *args: nullcontext(),
    )  # fmt: skip
    if checkout:
        source = Path(checkout, "nemo_rl", "models", "megatron", "train.py").read_text(encoding="utf-8")
        chosen = [node for node in ast.parse(source).body if getattr(node, "name", None) in FROM_NEMO_RL]
        assert len(chosen) == len(FROM_NEMO_RL)
        future = ast.parse("from __future__ import annotations").body
        exec(compile(ast.Module(body=future + chosen, type_ignores=[]), "train.py", "exec"), vars(train))
    else:
        stand_in(train)
    worker.megatron_forward_backward = train.megatron_forward_backward  # type: ignore[attr-defined]
    sys.modules[TRAIN], sys.modules[WORKER] = train, worker
    return worker


def stand_in(train: Any) -> None:
    """The same two functions in a few lines; they find each other in the module, where they may be wrapped."""

    def model_forward(
        model: Any, data_dict: Any, input_ids_cp_sharded: Tensor, position_ids: Any, attention_mask: Any,
        packed_seq_params: Any = None,
    ) -> Tensor:  # fmt: skip
        extra = {} if packed_seq_params is None else {"packed_seq_params": packed_seq_params}
        return model(input_ids=input_ids_cp_sharded, position_ids=position_ids, attention_mask=attention_mask, **extra)

    def megatron_forward_backward(
        model: Any, data_iterator: Any, num_microbatches: int, seq_length: int, mbs: int, post_processing_fn: Any,
        forward_only: bool = False, global_valid_seqs: Any = None, global_valid_toks: Any = None,
    ) -> Any:  # fmt: skip
        def forward_step(data_iterator: Any, model: Any) -> Any:
            part = next(data_iterator)
            output = train.model_forward(
                model=model, data_dict=part.data_dict, input_ids_cp_sharded=part.input_ids_cp_sharded,
                position_ids=part.position_ids, attention_mask=None, packed_seq_params=part.packed_seq_params,
            )  # fmt: skip
            return output, post_processing_fn(
                data_dict=part.data_dict, packed_seq_params=part.packed_seq_params,
                global_valid_seqs=global_valid_seqs, global_valid_toks=global_valid_toks,
            )  # fmt: skip

        return train.get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=data_iterator, model=model,
            num_microbatches=num_microbatches, seq_length=seq_length, micro_batch_size=mbs, forward_only=forward_only,
        )  # fmt: skip

    train.model_forward, train.megatron_forward_backward = model_forward, megatron_forward_backward


def microbatch(batch: Rollouts, rows: list[int], *, packed: bool, width: int) -> Any:
    """A ``ProcessedMicrobatch``; what speaks of a token stands at it, one behind its prediction."""
    from megatron.core.packed_seq_params import PackedSeqParams

    behind = lambda tensor: torch.roll(tensor, 1, 1)[rows]  # noqa: E731
    data = Batch(
        input_ids=batch.tokens[rows], token_mask=behind(batch.mask).float(), sample_mask=torch.ones(len(rows)),
        prev_logprobs=behind(batch.old_log_probs), input_lengths=torch.tensor([batch.lengths[row] for row in rows]),
        advantages=batch.advantages[rows].unsqueeze(1).expand(len(rows), LENGTH),
    )  # fmt: skip
    names = ("attention_mask", "mtp_loss_mask", "routed_experts_cp_sharded", "media_token_validity_mask")
    part = types.SimpleNamespace(data_dict=data, cu_seqlens_padded=None, **dict.fromkeys(names))
    part.packed_seq_params, part.input_ids = None, data["input_ids"]
    part.position_ids = torch.arange(LENGTH).expand(len(rows), LENGTH)
    if packed:
        lengths = data["input_lengths"].tolist()
        rest = width - sum(lengths)
        borders = torch.tensor([0, *lengths, rest], dtype=torch.int32).cumsum(0).int()
        part.packed_seq_params = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=width, max_seqlen_kv=width
        )
        tokens = torch.cat([data["input_ids"][i, :n] for i, n in enumerate(lengths)])
        part.input_ids = torch.nn.functional.pad(tokens, (0, rest)).unsqueeze(0)
        part.position_ids = torch.arange(width).unsqueeze(0)
    part.input_ids_cp_sharded = part.input_ids
    return part


def train(layout: Layout, checkout: str, config: OISDConfig) -> Outcome:
    """One training call of the worker's, then an evaluation; called on every rank."""
    from megatron.core import parallel_state

    from megatron_oisd.integrations import nemo_rl

    with parallel_world(layout):
        worker: Any = modules(checkout)
        installed = nemo_rl.install(config, vocab_size=VOCAB)
        assert nemo_rl.install(config) is installed or not config.enabled
        batch = make_rollouts()
        training = start(layout, batch)
        samples = list(range(parallel_state.get_data_parallel_rank(), len(batch.tokens), layout.dp))
        groups = [samples[i : i + layout.micro_batch] for i in range(0, len(samples), layout.micro_batch)]
        width = layout.micro_batch * LENGTH if layout.packed else LENGTH
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        for forward_only in (False, True):
            parts = [microbatch(batch, rows, packed=layout.packed, width=width) for rows in groups]
            worker.megatron_forward_backward(
                model=training.chunks[0], data_iterator=iter(parts), num_microbatches=len(groups), seq_length=width,
                mbs=1 if layout.packed else layout.micro_batch, post_processing_fn=LossPostProcessor(len(groups)),
                forward_only=forward_only, global_valid_seqs=torch.tensor(len(batch.tokens)),
                global_valid_toks=batch.mask.sum(),
            )  # fmt: skip
        return Outcome(0.0, installed.metrics(), pieces(training.bare))
