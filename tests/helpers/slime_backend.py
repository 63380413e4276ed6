"""slime's Megatron backend as a module: its own functions from a checkout, or a stand-in with the same names.

slime itself needs Ray, SGLang and a GPU to be imported; these functions do not. What they use of the rest of slime is
replaced here: context parallelism's slices, the accelerator, the reduction of metrics, the policy loss.
"""

from __future__ import annotations

import ast
import math
import os
import types
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.mcore import VOCAB, Layout, Rollouts, make_rollouts, pieces
from tests.helpers.mcore_run import Outcome, parallel_world, start

NAME = "slime.backends.megatron_utils.model"
FROM_SLIME = {
    "model.py": ("_wrap_forward_step_with_microbatch_pbar", "_with_rollout_top_p_token_keys", "train_one_step"),
    "data.py": ("get_batch", "DataIterator"),
}


def policy_loss(
    args: Any, batch: dict[str, Any], num_microbatches: int, step_global_batch_size: int, logits: Tensor
) -> Any:
    """GRPO of ``tests/helpers/mcore_run.py``, on slime's batch: a sum over response tokens, which Megatron divides."""
    from megatron.core import parallel_state

    from megatron_oisd.losses import grpo
    from megatron_oisd.losses.numerics import valid_columns

    group, width, start_, terms, tokens = parallel_state.get_tensor_model_parallel_group(), logits.shape[-1], 0, [], 0
    for i, total in enumerate(batch["total_lengths"]):
        where = torch.arange(start_ + total - batch["response_lengths"][i] - 1, start_ + total - 1)
        keep = batch["loss_masks"][i] > 0
        log_probs = grpo.vocab_parallel_log_probs(
            logits[0, where[keep]], batch["tokens"][0, where[keep] + 1], group=group, first_token=group.rank() * width,
            valid_columns=valid_columns(VOCAB, group.rank(), width),
        ).log_probs  # fmt: skip
        loss = grpo.policy_loss(log_probs, batch["log_probs"][i][keep], batch["advantages"][i][keep]).loss
        terms.append(loss.sum())
        tokens += int(keep.sum())
        start_ += total
    total_loss = torch.stack(terms).sum()
    return total_loss.clone(), torch.tensor(tokens, dtype=torch.int), {"keys": ["loss"], "values": total_loss.detach()}


def backend(checkout: str, args: Any) -> types.ModuleType:
    """The module; ``checkout`` empty: the stand-in."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    module = types.ModuleType(NAME)
    cpu = types.SimpleNamespace(current_device=lambda: torch.device("cpu"), device=lambda: torch.device("cpu"))
    vars(module).update(
        F=F, PackedSeqParams=PackedSeqParams, accelerator=cpu, get_args=lambda: args, math=math, mpu=parallel_state,
        get_forward_backward_func=get_forward_backward_func, loss_function=policy_loss, os=os, partial=partial,
        slice_with_cp=lambda tensor, pad: tensor, torch=torch, ROLLOUT_TOP_P_TOKEN_KEYS=(),
        train_metric_utils=types.SimpleNamespace(reduce_train_step_metrics=lambda losses, **_: {"loss": 0.0}),
    )  # fmt: skip
    if checkout:
        for file, names in FROM_SLIME.items():
            source = Path(checkout, "slime", "backends", "megatron_utils", file).read_text(encoding="utf-8")
            chosen = [node for node in ast.parse(source).body if getattr(node, "name", None) in names]
            future = ast.parse("from __future__ import annotations").body
            code = compile(ast.Module(body=future + chosen, type_ignores=[]), file, "exec")
            exec(code, vars(module))
    else:
        vars(module).update(get_batch=get_batch, train_one_step=partial_of(module), DataIterator=DataIterator)
    return module


class DataIterator:
    """The stand-in's."""

    def __init__(self, rollout_data: dict[str, Any], micro_batch_indices: list[list[int]]) -> None:
        self.rollout_data, self.micro_batch_indices, self.offset = rollout_data, micro_batch_indices, 0

    def get_next(self, keys: Any) -> dict[str, Any]:
        chosen = self.micro_batch_indices[self.offset]
        self.offset += 1
        values = {key: self.rollout_data.get(key) for key in keys}
        return {key: None if value is None else [value[i] for i in chosen] for key, value in values.items()}


def get_batch(data_iterator: Any, keys: Any, pad_multiplier: int = 128, allgather_cp: bool = False) -> dict[str, Any]:
    """The stand-in's: packs, and pads as a last sequence of its own."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    batch = data_iterator.get_next(keys)
    lengths = [len(tokens) for tokens in batch["tokens"]]
    rest = -sum(lengths) % (pad_multiplier * parallel_state.get_tensor_model_parallel_world_size())
    borders = torch.tensor([0, *lengths, *([rest] if rest else [])], dtype=torch.int32).cumsum(0).int()
    longest = max(*lengths, rest)
    batch["packed_seq_params"] = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    batch["tokens"] = F.pad(torch.cat(batch["tokens"]), (0, rest)).unsqueeze(0)
    batch["full_loss_masks"] = None
    return batch


def partial_of(module: Any) -> Any:
    """The stand-in's ``train_one_step``, which finds its helpers in the module, where they may be wrapped."""

    def train_one_step(
        args: Any, rollout_id: int, step_id: int, data_iterator: Any, model: Any, optimizer: Any,
        opt_param_scheduler: Any, num_microbatches: int, step_global_batch_size: int, microbatch_pbar: Any = None,
    ) -> Any:  # fmt: skip
        for chunk in model:
            chunk.zero_grad_buffer()

        def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
            keys = ["tokens", "total_lengths", "response_lengths", "loss_masks", "log_probs", "advantages"]
            batch = module.get_batch(data_iterator, keys, args.data_pad_size_multiplier, args.allgather_cp)
            output = model(
                input_ids=batch["tokens"], position_ids=None, attention_mask=None,
                packed_seq_params=batch["packed_seq_params"],
            )  # fmt: skip
            return output, partial(module.loss_function, args, batch, num_microbatches, step_global_batch_size)

        module.get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=data_iterator, model=model,
            num_microbatches=num_microbatches, seq_length=args.seq_length, micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )  # fmt: skip
        return {}, optimizer.step()[1]

    return train_one_step


def rollout_data(batch: Rollouts, *, last_stage: bool) -> dict[str, list[Any]]:
    """The batch as slime keeps it: lists of samples, tensors over response tokens; advantages on the last stage."""
    data: dict[str, list[Any]] = {
        name: [] for name in ("tokens", "total_lengths", "response_lengths", "loss_masks", "log_probs", "advantages")
    }
    for row, length in enumerate(batch.lengths):
        first = int(batch.mask[row].nonzero()[0])  # predicts the first response token
        where = slice(first, length - 1)
        data["tokens"].append(batch.tokens[row, :length])
        data["total_lengths"].append(length)
        data["response_lengths"].append(length - 1 - first)
        data["loss_masks"].append(batch.mask[row, where].int())
        data["log_probs"].append(batch.old_log_probs[row, where])
        data["advantages"].append(batch.advantages[row].expand(length - 1 - first))
    if not last_stage:
        del data["advantages"], data["log_probs"]
    return data


def train(layout: Layout, checkout: str, oisd: dict[str, Any]) -> Outcome:
    """One ``train_one_step`` with the adapter installed; called on every rank."""
    import sys

    from megatron.core import parallel_state

    from megatron_oisd.integrations import slime

    with parallel_world(layout):
        batch = make_rollouts()
        args = Namespace(
            data_pad_size_multiplier=8, allgather_cp=False, seq_length=64, decoder_seq_length=None, micro_batch_size=1,
            custom_megatron_before_train_step_hook_path=None, enable_mtp_training=False, save_debug_train_data=None,
            check_for_nan_in_loss_and_grad=True, ci_test=False, calculate_per_token_loss=True, vocab_size=VOCAB,
            use_rollout_top_p_tokens=False, rollout_top_p=1.0, **oisd,
        )  # fmt: skip
        sys.modules[NAME] = module = backend(checkout, args)
        slime.install(args)
        slime.install(args)  # once in a process
        training = start(layout, batch)
        data = rollout_data(batch, last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True))
        replica, dp = parallel_state.get_data_parallel_rank(), layout.dp
        samples = list(range(replica, len(batch.tokens), dp))
        groups = [samples[i : i + layout.micro_batch] for i in range(0, len(samples), layout.micro_batch)]
        iterators = [module.DataIterator(data, groups) for _ in training.chunks]
        found: dict[str, Any] = {}

        class Optimizer:
            def zero_grad(self) -> None:
                pass

            def step(self) -> tuple[bool, float, int]:
                found["gradients"] = pieces(training.bare)  # slime clears them at the end of the step
                return True, 1.0, 0

        scheduler = types.SimpleNamespace(num_steps=0, step=lambda increment: None)
        metrics, _ = module.train_one_step(
            args, 0, 0, iterators, training.chunks, Optimizer(), scheduler, len(groups), len(batch.tokens),
            microbatch_pbar=None,
        )  # fmt: skip
        assert "oisd_advantages" in data or not oisd.get("oisd_lambda_think", 1.0)
        return Outcome(0.0, metrics, found["gradients"])
