"""slime: OISD in its Megatron backend, by its own hook and with no change to its sources.

    python train.py ... --custom-megatron-init-path megatron_oisd.integrations.slime.install \\
        --custom-config-path oisd.yaml

where ``oisd.yaml`` holds ``oisd_layers: [6]`` and any further field of ``OISDConfig`` with the prefix ``oisd_``. slime
calls :func:`install` once Megatron is initialised; it wraps three names of ``slime.backends.megatron_utils.model``:
``train_one_step`` (attaches at the first step, adds the metrics), ``get_forward_backward_func`` (the step and, around
its forward step, the microbatch) and ``get_batch`` (what the microbatch is made of). Log-probability passes and the
critic are left alone. ``docs/other_frameworks.md`` says what was tested.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError

BACKEND = "slime.backends.megatron_utils.model"
WRAPPED = ("train_one_step", "get_forward_backward_func", "get_batch")
_ADVANTAGES = "oisd_advantages"
"""The rollout's advantages on every stage; slime computes them on the last."""


def config_from_args(args: Any) -> OISDConfig:
    """Make the configuration from the attributes ``oisd_*`` of slime's arguments.

    Raises:
        OISDError: ``oisd_layers`` is missing, there is no such field, or a value is out of its range.
    """
    given = {name.removeprefix("oisd_"): value for name, value in vars(args).items() if name.startswith("oisd_")}
    fields = {item.name for item in dataclasses.fields(OISDConfig)}
    unknown = sorted(given.keys() - fields)
    if unknown:
        raise OISDError(
            f"oisd_{unknown[0]} is no option of OISD: expected oisd_ and one of {', '.join(sorted(fields))}"
        )
    if "layers" not in given:
        raise OISDError("oisd_layers is not set: put e.g. 'oisd_layers: [6]' into the file of --custom-config-path")
    return OISDConfig(**given)


def microbatch_weights(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mask and advantages ``[1, t]`` of a packed microbatch, on the CPU, aligned with the predictions.

    A sample's masks and advantages speak of its response tokens; the prediction of a token is one position before it.
    """
    length = batch["tokens"].shape[1]
    mask, advantages = torch.zeros(1, length), torch.zeros(1, length)
    start = 0
    for index, total in enumerate(batch["total_lengths"]):
        stop = start + total - 1
        where = slice(stop - batch["response_lengths"][index], stop)
        mask[0, where] = batch["loss_masks"][index].float().cpu()
        advantages[0, where] = batch[_ADVANTAGES][index].float().cpu()
        start += total
    return mask, advantages


class _Training:
    """OISD on slime's actor, and the step and microbatch that are under way."""

    def __init__(self, config: OISDConfig) -> None:
        self.config = config
        self.oisd: Any = None
        self.step: dict[str, Any] | None = None
        """Arguments of the ``train_one_step`` that is running on the actor."""
        self.forward: tuple[Any, ExitStack] | None = None
        """The chunk whose forward step is running, and what its end leaves."""

    def attach(self, args: Any, chunks: Sequence[Any]) -> Any:
        from megatron.core import parallel_state

        from megatron_oisd import OISD

        if parallel_state.get_context_parallel_world_size() > 1:
            raise OISDError(
                f"context_parallel_size is {parallel_state.get_context_parallel_world_size()}: slime's samples are cut "
                "before the adapter sees them; set --context-parallel-size 1"
            )
        return OISD(
            self.config,
            chunks,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            vocab_size=getattr(args, "vocab_size", None),
        )

    # ---------------------------------------------------------------------------------------- the three wrapped names

    def train_one_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        if getattr(given["model"][0], "role", "actor") != "actor":
            return original(*args, **kwargs)
        if self.oisd is None:
            self.oisd = self.attach(given["args"], given["model"])
        share_advantages(given["data_iterator"][0].rollout_data)
        self.step = given
        try:
            losses, grad_norm = original(*args, **kwargs)
        finally:
            self.step = None
        return {**losses, **self.oisd.metrics()}, grad_norm

    def get_forward_backward_func(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        schedule, given = original(*args, **kwargs), self.step
        if given is None:
            return schedule

        def forward_backward(*, forward_step_func: Callable[..., Any], **options: Any) -> Any:
            @functools.wraps(forward_step_func)
            def forward_step(data_iterator: Any, model: Any, *rest: Any, **more: Any) -> Any:
                with ExitStack() as stack:
                    self.forward = model, stack
                    try:
                        return forward_step_func(data_iterator, model, *rest, **more)
                    finally:
                        self.forward = None

            number = getattr(given["opt_param_scheduler"], "num_steps", None)  # kept in checkpoints
            counts = count_samples(given["data_iterator"][0], given["num_microbatches"])
            with self.oisd.step(num_microbatches=given["num_microbatches"], step=number, **counts):
                return schedule(forward_step_func=forward_step, **options)

        return forward_backward

    def get_batch(self, original: Callable[..., Any], data_iterator: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
        if self.forward is None:
            return original(data_iterator, keys, *args, **kwargs)
        model, stack = self.forward
        batch = original(data_iterator, [*keys, _ADVANTAGES], *args, **kwargs)
        mask, advantages = microbatch_weights(batch)
        del batch[_ADVANTAGES]
        stack.enter_context(
            self.oisd.microbatch(
                model, loss_mask=mask, advantages=advantages, packed_seq_params=batch["packed_seq_params"]
            )
        )
        return batch


def share_advantages(rollout_data: dict[str, Any]) -> None:
    """Bring the last stage's advantages to all stages, once a rollout; an object broadcast over the pipeline."""
    from megatron.core import parallel_state

    if _ADVANTAGES in rollout_data:
        return
    shared: list[Any] = [None]
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        shared = [[advantage.detach().float().cpu() for advantage in rollout_data["advantages"]]]
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast_object_list(shared, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    rollout_data[_ADVANTAGES] = shared[0]


def count_samples(data_iterator: Any, num_microbatches: int) -> dict[str, int]:
    """Samples and response tokens of the step, over all data-parallel ranks; one all-reduce of two numbers."""
    from megatron.core import parallel_state

    first = data_iterator.offset
    samples = [i for part in data_iterator.micro_batch_indices[first : first + num_microbatches] for i in part]
    # A sample without a token counts as one, as in slime's own sum.
    tokens = sum(max(float(data_iterator.rollout_data["loss_masks"][i].sum()), 1.0) for i in samples)
    counts = torch.tensor([len(samples), tokens], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    num_sequences, num_tokens = (int(count) for count in counts.tolist())
    return {"num_sequences": num_sequences, "num_tokens": num_tokens}


def install(args: Any) -> None:
    """slime's ``--custom-megatron-init-path``: wrap the three names, once in a process.

    Raises:
        OISDError: the options cannot be used, or slime's backend lacks one of the names.
    """
    config = config_from_args(args)
    if not config.enabled:
        return
    backend = importlib.import_module(BACKEND)
    missing = [name for name in WRAPPED if not callable(getattr(backend, name, None))]
    if missing:
        raise OISDError(
            f"{BACKEND} has no {missing[0]}: this slime is another than the one in docs/other_frameworks.md"
        )
    if hasattr(getattr(backend, WRAPPED[0]), "oisd_training"):
        return
    training = _Training(config)
    for name in WRAPPED:
        original = getattr(backend, name)
        wrapper = functools.wraps(original)(functools.partial(getattr(training, name), original))
        wrapper.oisd_training = training  # type: ignore[attr-defined]
        setattr(backend, name, wrapper)
