"""verl's Megatron actor as a module: its own ``forward_backward_batch``, packing and model call from a checkout.

verl itself needs Ray, TensorDict and a GPU to be imported; these functions do not. What they use of the rest is
replaced here: containers of tensors, router replay, the policy loss and the vocabulary-parallel log-probabilities.
"""

from __future__ import annotations

import ast
import math
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.config import OISDConfig
from tests.helpers.mcore import VOCAB, Layout, Rollouts, make_rollouts, pieces
from tests.helpers.mcore_run import Outcome, parallel_world, start


class Tensors(dict):  # type: ignore[type-arg]
    """A ``TensorDict``."""

    def contiguous(self) -> Tensors:
        return self

    def to(self, device: Any) -> Tensors:
        return self

    def split(self, size: int) -> list[Tensors]:
        count = len(self["input_ids"])
        return [Tensors({k: v[i : i + size] for k, v in self.items()}) for i in range(0, count, size)]


class Data:
    """A ``DataProto``."""

    def __init__(self, batch: Tensors) -> None:
        self.batch, self.non_tensor_batch, self.meta_info = batch, {}, {"temperature": 1.0}

    def to(self, device: Any) -> Data:
        return self


def log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    from megatron.core import parallel_state

    from megatron_oisd.losses.grpo import vocab_parallel_log_probs
    from megatron_oisd.losses.numerics import valid_columns

    group, width = parallel_state.get_tensor_model_parallel_group(), logits.shape[-1]
    found = vocab_parallel_log_probs(
        logits.flatten(0, 1), labels.flatten(), group=group, first_token=group.rank() * width,
        valid_columns=valid_columns(VOCAB, group.rank(), width),
    )  # fmt: skip
    return found.log_probs.view(labels.shape)


def policy_loss(*, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, **_: Any) -> Any:
    """Mean over the microbatch's response tokens of GRPO's clipped loss."""
    from megatron_oisd.losses import grpo

    keep = response_mask.bool()
    return grpo.policy_loss(log_prob[keep], old_log_prob[keep], advantages[keep]).loss.mean(), {}


def broadcast(batch: Tensors, src: int, group: Any) -> None:
    for key in sorted(batch):
        tensor = batch[key].contiguous().to(torch.uint8) if batch[key].dtype is torch.bool else batch[key].contiguous()
        dist.broadcast(tensor, src, group=group)
        batch[key] = tensor.to(batch[key].dtype)


def execute(checkout: str, file: str, names: tuple[str, ...], namespace: dict[str, Any]) -> None:
    """Define some functions of a source file, also methods, without their decorators."""
    tree = ast.parse(Path(checkout, file).read_text(encoding="utf-8"))
    chosen = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in chosen} == set(names)
    for node in chosen:
        node.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module(body=future + chosen, type_ignores=[]), file, "exec"), namespace)


def install(checkout: str) -> Any:
    """Put the module in its place; returns its actor class."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_oisd.integrations import verl

    def unwrap_model(model: Any) -> Any:
        return model.module if hasattr(model, "module") else model

    common = {"torch": torch, "mpu": parallel_state, "PackedSeqParams": PackedSeqParams, "math": math}
    mcore: Any = types.ModuleType("verl.models.mcore")
    space: dict[str, Any] = {**common, "unwrap_model": unwrap_model}
    execute(checkout, "verl/models/mcore/util.py", ("preprocess_packed_seqs", "postprocess_packed_seqs"), space)
    execute(checkout, "verl/models/mcore/model_forward.py", ("model_forward_gen",), space)
    mcore.get_mcore_forward_fn = lambda config: space["model_forward_gen"]()
    mcore.get_mcore_forward_fused_fn = None
    replay = {name: staticmethod(lambda *args: False) for name in ("is_replay_backward_action", "is_r2_record_action")}
    replay["is_replay_forward_action"] = staticmethod(lambda *args: False)
    module: Any = types.ModuleType(verl.MODULE)
    vars(module).update(
        common, partial=partial, os=os, get_forward_backward_func=get_forward_backward_func, unwrap_model=unwrap_model,
        get_device_id=lambda: "cpu", broadcast_dict_tensor=broadcast, RouterReplayHelper=type("Helper", (), replay),
        get_policy_loss_fn=lambda mode: policy_loss, vocab_parallel_log_probs_from_logits=log_probs_from_logits,
        append_to_dict=lambda total, new: [total.setdefault(k, []).append(v) for k, v in new.items()],
        make_batch_generator=lambda batches, vpp_size: iter(batches),
    )  # fmt: skip
    execute(checkout, "verl/workers/actor/megatron_actor.py", ("forward_backward_batch",), vars(module))
    module.MegatronPPOActor = type("Actor", (), {"forward_backward_batch": module.forward_backward_batch})
    for name in ("verl", "verl.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[mcore.__name__], sys.modules[module.__name__] = mcore, module
    return module.MegatronPPOActor


def mini_batch(batch: Rollouts, rows: list[int]) -> Tensors:
    """Prompts padded on the left, responses on the right."""
    firsts = [int(batch.mask[row].nonzero()[0]) + 1 for row in rows]  # first response token
    prompt, response = max(firsts), max(batch.lengths[row] - first for row, first in zip(rows, firsts, strict=True))
    names = ("input_ids", "attention_mask", "position_ids")
    whole = {name: torch.zeros(len(rows), prompt + response, dtype=torch.long) for name in names}
    parts = {
        name: torch.zeros(len(rows), response) for name in ("response_mask", "advantages", "old_log_probs", "responses")
    }
    for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        length, left = batch.lengths[row], prompt - first
        whole["input_ids"][i, left : left + length] = batch.tokens[row, :length]
        whole["attention_mask"][i, left : left + length] = 1
        whole["position_ids"][i, left : left + length] = torch.arange(length)
        predicted, count = slice(first - 1, length - 1), length - first
        parts["response_mask"][i, :count] = batch.mask[row, predicted].float()
        parts["old_log_probs"][i, :count] = batch.old_log_probs[row, predicted]
        parts["advantages"][i] = batch.advantages[row]
        parts["responses"][i, :count] = batch.tokens[row, first:length].float()
    parts["responses"] = parts["responses"].long()
    return Tensors(whole | parts)


def train(layout: Layout, checkout: str, config: OISDConfig) -> Outcome:
    """One mini-batch's update as ``update_policy`` makes it, then a log-probability pass; called on every rank."""
    from megatron.core import parallel_state

    with parallel_world(layout):
        from megatron_oisd.integrations import verl

        actor_class = install(checkout)
        verl.install(config)
        verl.install(config)  # once in a process
        batch = make_rollouts()
        training = start(layout, batch)
        options = types.SimpleNamespace(
            loss_agg_mode="token-mean", entropy_coeff=0.0, use_kl_loss=False, policy_loss={}, clip_ratio=0.2,
            megatron=types.SimpleNamespace(use_remove_padding=True), get=lambda name, default: default,
        )  # fmt: skip
        actor = actor_class()
        vars(actor).update(
            actor_module=training.chunks, config=options, tf_config=None, use_fused_kernels=False, mtp_config=None,
            hf_config=types.SimpleNamespace(vocab_size=VOCAB),
        )  # fmt: skip
        replica, per_rank = parallel_state.get_data_parallel_rank(), len(batch.tokens) // layout.dp
        rows = list(range(replica * per_rank, (replica + 1) * per_rank))
        for chunk in training.chunks:
            chunk.zero_grad_buffer()
        tensors = mini_batch(batch, rows)
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            tensors["advantages"].zero_()  # the last stage's count
        result = actor.forward_backward_batch(Data(tensors), micro_batch_size=1)
        with torch.no_grad():
            actor.forward_backward_batch(Data(mini_batch(batch, rows)), forward_only=True, micro_batch_size=1)
        return Outcome(0.0, result["output"][0][0] if result["output"] else {}, pieces(training.bare))
