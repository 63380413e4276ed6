"""verl: OISD in its Megatron actor, by ``external_lib`` and with no change to its sources.

    OISD_CONFIG='{"layers": [6]}' python3 -m verl.trainer.main_ppo --config-name=ppo_megatron_trainer \\
        actor_rollout_ref.model.external_lib=megatron_oisd.integrations.verl \\
        +ray_kwargs.ray_init.runtime_env.env_vars.OISD_CONFIG="'${OISD_CONFIG}'" ...

verl's Megatron worker imports this module before it makes its actor; with ``OISD_CONFIG`` set, a JSON object of
``OISDConfig``'s fields, importing installs. :func:`install` wraps ``MegatronPPOActor.forward_backward_batch`` (attaches
at the first update, adds metrics) and the module's ``get_forward_backward_func`` (the step and, around its forward
step, the microbatch). Log-probability passes are left alone. ``docs/other_frameworks.md`` says what was tested.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline.microbatch import packed_borders

VARIABLE = "OISD_CONFIG"
MODULE, ACTOR = "verl.workers.actor.megatron_actor", "MegatronPPOActor"


def config_from_text(text: str) -> OISDConfig:
    """Make the configuration from a JSON object.

    Raises:
        OISDError: it is none, or has a field that is not OISD's.
    """
    try:
        return OISDConfig(**json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise OISDError(
            f"{VARIABLE} is {text!r}: expected a JSON object of OISD's options, e.g. '{{\"layers\": [6]}}' ({error})"
        ) from None


def microbatch_weights(batch: Mapping[str, Tensor], packed_seq_params: Any, length: int) -> tuple[Tensor, Tensor]:
    """Mask and advantages as the model sees the microbatch: ``[b, length]``, packed ``[1, t]``; on the CPU.

    verl pads prompts on the left and responses on the right, ``[b, S]``, and removes both before the model; masks and
    advantages are those of the responses, ``[b, R]``, and stand at the token that is predicted.

    Args:
        batch: verl's microbatch.
        packed_seq_params: the model's, None where rows are not packed.
        length: of the model's rows, where they are not packed.
    """
    attended = batch["attention_mask"].bool().cpu()
    responses = batch["response_mask"].shape[1]
    where = slice(attended.shape[1] - responses - 1, attended.shape[1] - 1)
    borders = None if packed_seq_params is None else packed_borders(packed_seq_params)
    shape = (len(attended), length) if borders is None else (1, borders[-1])
    found = []
    for values in (batch["response_mask"], batch["advantages"]):
        spread, result = torch.zeros(attended.shape), torch.zeros(shape)
        spread[:, where] = values.float().cpu()
        for row, kept in enumerate(attended):
            tokens = spread[row, kept]
            line, start = (row, 0) if borders is None else (0, borders[row])
            result[line, start : start + len(tokens)] = tokens
        found.append(result)
    return found[0], found[1]


class _Training:
    """OISD on the actor, and the update and microbatch that are under way."""

    def __init__(self, config: OISDConfig) -> None:
        self.config = config
        self.oisd: Any = None
        self.data: Any = None
        """The mini-batch whose update is running."""
        self.forward: tuple[Any, ExitStack] | None = None
        """The microbatch whose forward step is running, and what its end leaves."""

    def attach(self, chunks: list[Any], hf_config: Any) -> Any:
        from megatron.core import parallel_state

        from megatron_oisd import OISD

        size = parallel_state.get_context_parallel_world_size()
        if size > 1:
            raise OISDError(
                f"context_parallel_size is {size}: the adapter for verl was not made for it; set "
                "actor_rollout_ref.actor.megatron.context_parallel_size=1"
            )
        oisd = OISD(
            self.config,
            chunks,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            # Megatron's rows beyond the Hugging Face model's are padding.
            vocab_size=getattr(getattr(hf_config, "text_config", hf_config), "vocab_size", None),
        )
        for chunk in chunks if self.config.enabled else ():
            chunk.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        return oisd

    def _before_forward(self, chunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Enter the microbatch when the model is called: only then is it known how its tokens are packed."""
        if self.forward is None:
            return
        batch, stack = self.forward
        self.forward = None
        packed = kwargs.get("packed_seq_params")
        length = 0 if packed is not None else kwargs["attention_mask"].shape[-1]
        mask, advantages = microbatch_weights(batch, packed, length)
        stack.enter_context(
            self.oisd.microbatch(chunk, loss_mask=mask, advantages=advantages, packed_seq_params=packed)
        )

    def forward_backward_batch(
        self, original: Callable[..., Any], actor: Any, data: Any, forward_only: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if forward_only:
            return original(actor, data, forward_only, *args, **kwargs)
        if self.oisd is None:
            self.oisd = self.attach(list(actor.actor_module), actor.hf_config)
        self.data = data
        try:
            result = original(actor, data, forward_only, *args, **kwargs)
        finally:
            self.data = None
        metrics = self.oisd.metrics()
        if result["output"]:  # the last stage's; verl reads it there
            result["output"][0][0].update({f"actor/{name}": [value] for name, value in metrics.items()})
        return result

    def get_forward_backward_func(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        schedule, data = original(*args, **kwargs), self.data
        if data is None:
            return schedule

        def forward_backward(*, forward_step_func: Callable[..., Any], num_microbatches: int, **options: Any) -> Any:
            @functools.wraps(forward_step_func)
            def forward_step(batch_iter: Any, model: Any, *rest: Any, **more: Any) -> Any:
                batch = next(batch_iter)
                with ExitStack() as stack:
                    self.forward = batch, stack
                    try:
                        return forward_step_func(iter([batch]), model, *rest, **more)
                    finally:
                        self.forward = None

            # By now all stages have the last stage's mini-batch.
            with self.oisd.step(num_microbatches=num_microbatches, **count(data.batch["response_mask"])):
                return schedule(forward_step_func=forward_step, num_microbatches=num_microbatches, **options)

        return forward_backward


def count(response_mask: Tensor) -> dict[str, int]:
    """Sequences and response tokens of the mini-batch over all data-parallel ranks; one all-reduce of two numbers."""
    from megatron.core import parallel_state

    numbers = [len(response_mask), int((response_mask > 0).sum())]
    counts = torch.tensor(numbers, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    num_sequences, num_tokens = (int(number) for number in counts.tolist())
    return {"num_sequences": num_sequences, "num_tokens": max(num_tokens, 1)}


def install(config: OISDConfig) -> None:
    """Wrap the two names in this process, once.

    Raises:
        OISDError: verl lacks one of the names.
    """
    if not config.enabled:
        return
    module = importlib.import_module(MODULE)
    actor = getattr(module, ACTOR, None)
    original = getattr(actor, "forward_backward_batch", None)
    schedules = getattr(module, "get_forward_backward_func", None)
    if original is None or schedules is None:
        name = f"{ACTOR}.forward_backward_batch" if original is None else "get_forward_backward_func"
        raise OISDError(f"{MODULE} has no {name}: this verl is another than the one in docs/other_frameworks.md")
    if hasattr(original, "oisd_training"):
        return
    training = _Training(config)

    @functools.wraps(original)
    def forward_backward_batch(actor: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        return training.forward_backward_batch(original, actor, data, *args, **kwargs)

    forward_backward_batch.oisd_training = training  # type: ignore[attr-defined]
    actor.forward_backward_batch = forward_backward_batch  # type: ignore[union-attr]
    wrapped = functools.partial(training.get_forward_backward_func, schedules)
    setattr(module, "get_forward_backward_func", functools.wraps(schedules)(wrapped))  # noqa: B010


if VARIABLE in os.environ:
    install(config_from_text(os.environ[VARIABLE]))
