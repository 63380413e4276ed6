"""NeMo-Aligner: its REINFORCE and PPO actors with the two OISD losses added.

``OISDReinforceActorModel`` and ``OISDActorModel`` extend ``MegatronGPTReinforceActorModel`` and
``MegatronGPTActorModel`` by subclass; what they need is under ``model.oisd`` in the configuration.
:func:`run_recipe` runs NeMo-Aligner's own, unchanged training script with them.

The actor keeps its loss, its schedule and its optimizer. Added are: :class:`~megatron_oisd.OISD` on its chunks, at the
first ``prepare_for_training``; the microbatch context around its forward; and the gradients of the lens, handed to
their owner before the actor reduces gradients. A rollout that did not end has no weight, as in the policy loss.

NeMo-Aligner is imported when one of the two classes is first asked for, not before. Tested with NeMo-Aligner 0.7.0,
NeMo 2.1.0 and Megatron-Core 0.10.0: ``docs/nemo_aligner.md``.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError

SECTION = "model.oisd"
_MASK, _ADVANTAGES = "oisd_mask", "oisd_advantages"
"""Added to a batch so that NeMo splits them into microbatches like everything else; the policy loss never sees them."""


def config_from_section(section: Mapping[str, Any] | None) -> OISDConfig:
    """Make the configuration from the section ``model.oisd``, whose keys are the fields of ``OISDConfig``.

    Raises:
        OISDError: the section is missing, has an unknown key, or a value out of its range.
    """
    if section is None:
        raise OISDError(
            f"{SECTION} is missing: take it from examples/nemo_aligner/conf, or set at least {SECTION}.layers"
        )
    fields = {item.name for item in dataclasses.fields(OISDConfig)}
    unknown = sorted(str(key) for key in section if key not in fields)
    if unknown:
        raise OISDError(f"{SECTION} has the key {unknown[0]!r}: expected one of {', '.join(sorted(fields))}")
    values = {str(key): section[key] for key in section}
    if values.get("layers") is None:
        raise OISDError(f"{SECTION}.layers is not set: give the student layers, counted from 1, e.g. [6]")
    return OISDConfig(**values)


def reinforce_advantages(batch: Mapping[str, Tensor]) -> Tensor:
    """``[B]``: what REINFORCE's loss weights a rollout by, its reward less the leave-one-out baseline."""
    return batch["rewards_with_kl"] - batch["baseline"]


def ppo_advantages(batch: Mapping[str, Tensor]) -> Tensor:
    """``[B, s - 1]``: PPO's advantages, one for each prediction."""
    return batch["advantages"]


def response_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """``[B, s - 1]``, non-zero where the prediction belongs to a response that ended."""
    return batch["mask"] * batch["is_end"].reshape(-1, 1).to(batch["mask"])


def add_weights(batch: Mapping[str, Any], advantages: Tensor, mask: Tensor) -> dict[str, Any]:
    """A copy of the batch with OISD's mask ``[B, s]`` and advantages ``[B]`` or ``[B, s]``, on the CPU.

    NeMo-Aligner leaves the last position out, which predicts nothing; OISD's mask is as long as the tokens.
    """
    width = batch["response_tokens"].shape[1]

    def whole(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2:
            tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
        return tensor.detach().cpu()

    return {**batch, _MASK: whole(mask), _ADVANTAGES: whole(advantages.float())}


def check_actor(actor: Any, config: OISDConfig) -> None:
    """Raise :class:`OISDError` for options of NeMo's under which the losses or their gradients would not be exact."""
    options, optimizer = actor.cfg, actor.cfg.optim
    customized = options.get("mcore_customization_config") or {}
    if customized.get("final_logit_softcapping"):
        raise OISDError(
            "model.mcore_customization_config.final_logit_softcapping is set: the lens does not cap its logits; OISD "
            "does not support this model"
        )
    if options.get("context_parallel_size", 1) > 1:
        raise OISDError(
            f"model.context_parallel_size is {options.context_parallel_size}: NeMo-Aligner's actors do not divide "
            "their rollouts over context-parallel ranks; set it to 1"
        )
    if actor.enable_autocast:
        raise OISDError(
            f"model.megatron_amp_O2 is off with precision {options.precision}: the lens would mix types under "
            "autocast; set model.megatron_amp_O2=True, or precision 32"
        )
    if not config.head_gradient or not config.lambda_think:
        return
    # What follows reduces the gradient of norm and unembedding before the lens has given its part.
    # Megatron-Core's own distributed optimizer is not among it: megatron_oisd.pipeline.overlap sees to that one.
    if actor.use_mcore_dist_optim:
        return
    if actor.with_distributed_adam and optimizer.get("overlap_grad_sync", False):
        raise OISDError(
            "model.optim.overlap_grad_sync is on: gradients of norm and unembedding are reduced before the lens' part "
            f"is there; switch it off, or set {SECTION}.head_gradient=False"
        )
    from megatron.core import parallel_state

    if (
        actor.megatron_amp_O2
        and not actor.with_distributed_adam
        and options.get("pipeline_model_parallel_size", 1) == 1
        and not options.get("sequence_parallel", False)
        and options.get("async_grad_allreduce", True)
        and parallel_state.get_data_parallel_world_size() > 1
    ):
        raise OISDError(
            f"model.optim.name is {optimizer.name} and model.async_grad_allreduce is on: gradients are reduced within "
            "backward, before the lens' part is there; use distributed_fused_adam or mcore_distributed_optim, or set "
            f"{SECTION}.head_gradient=False"
        )


class _OISDActor:
    """What both actors have in common; the actor itself is the next class in line."""

    cfg: Any
    model: Any
    tokenizer: Any
    use_mcore_dist_optim: bool
    oisd: Any = None
    """``megatron_oisd.OISD``, from the first ``prepare_for_training`` on."""
    _advantages: Callable[[Mapping[str, Tensor]], Tensor]

    def __init__(self, cfg: Any, trainer: Any) -> None:
        self.oisd_config = config_from_section(cfg.get("oisd"))  # before anything is loaded
        super().__init__(cfg, trainer)  # type: ignore[call-arg]

    def prepare_for_training(self) -> None:
        """Attach at the first call, when the weights are loaded and the optimizer exists; refresh at every call."""
        super().prepare_for_training()  # type: ignore[misc]
        if self.oisd is None:
            self.oisd = self._attach()
        else:
            self.oisd.sync()  # the weights were swapped for the reference policy's in between, or loaded

    def _attach(self) -> Any:
        from megatron.core import parallel_state

        from megatron_oisd import OISD

        check_actor(self, self.oisd_config)
        return OISD(
            self.oisd_config,
            self.model if isinstance(self.model, list) else [self.model],
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            vocab_size=None if self.cfg.get("override_vocab_size") else self.tokenizer.vocab_size,
        )

    def get_loss_and_metrics(self, batch: Any, forward_only: bool) -> tuple[float, dict[str, float]]:
        """One optimizer step's forward and backward passes, OISD's gradients and metrics among the actor's own."""
        if forward_only or not self.oisd_config.enabled:
            return super().get_loss_and_metrics(batch, forward_only)  # type: ignore[misc]
        from megatron.core import parallel_state
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        # Every rank of the model has its own copy, by its own arithmetic: to the last bit they must be the same.
        group = parallel_state.get_model_parallel_group()
        advantages, mask = (_from_first_rank(value, group) for value in (self._advantages(batch), response_mask(batch)))
        counts = mask.new_tensor([len(mask), mask.count_nonzero()], dtype=torch.float64)
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        num_sequences, num_tokens = (int(count) for count in counts.tolist())
        with self.oisd.step(
            num_microbatches=get_num_microbatches(),
            num_sequences=num_sequences,
            num_tokens=max(num_tokens, 1),
            step=self._optimizer_step(),
        ):
            batch = add_weights(batch, advantages, mask)
            loss, metrics = super().get_loss_and_metrics(batch, forward_only)  # type: ignore[misc]
        return loss, {**metrics, **self.oisd.metrics()}

    def get_actor_forward_output_and_loss_func(self) -> Callable[..., Any]:
        """The actor's own closure, within the microbatch's context."""
        original = super().get_actor_forward_output_and_loss_func()  # type: ignore[misc]
        if self.oisd is not None:
            self.oisd.wrap_finalize()  # just before this the actor has set the function anew

        def forward_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> Any:
            batch = dict(next(data_iterator))
            mask, advantages = batch.pop(_MASK, None), batch.pop(_ADVANTAGES, None)
            if mask is None:
                return original(iter([batch]), model)
            with self.oisd.microbatch(model, loss_mask=mask, advantages=advantages):
                return original(iter([batch]), model)

        return forward_step

    def finish_training_step(self) -> None:
        """Hand the lens' gradients to their owner, then let the actor reduce gradients as always.

        Megatron-Core's distributed optimizer has had them already, in the schedule's last act.
        """
        if self.oisd is not None and not self.use_mcore_dist_optim:
            self.oisd.reduce_head_gradients()
        super().finish_training_step()  # type: ignore[misc]

    def _optimizer_step(self) -> int | None:
        """Number of the optimizer step, which the learning rate's schedule keeps in checkpoints; None without one."""
        scheduler = getattr(self, "_scheduler", None)
        scheduler = scheduler.get("scheduler") if isinstance(scheduler, dict) else scheduler
        return getattr(scheduler, "last_epoch", None)


def _from_first_rank(tensor: Tensor, group: Any) -> Tensor:
    """The tensor as the first rank of ``group`` has it, on the device that the group communicates from."""
    tensor = tensor.detach().to(torch.cuda.current_device(), copy=True).contiguous()
    dist.broadcast(tensor, dist.get_process_group_ranks(group)[0], group=group)
    return tensor


_ACTORS = {
    "OISDReinforceActorModel": ("megatron_gpt_reinforce_actor", "MegatronGPTReinforceActorModel", reinforce_advantages),
    "OISDActorModel": ("megatron_gpt_ppo_actor", "MegatronGPTActorModel", ppo_advantages),
}
_RECIPES = {"reinforce": "OISDReinforceActorModel", "ppo": "OISDActorModel"}


def __getattr__(name: str) -> Any:
    """Make the actor classes when they are asked for: their bases need NeMo-Aligner."""
    if name not in _ACTORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base, advantages = _ACTORS[name]
    parent = getattr(importlib.import_module(f"nemo_aligner.models.nlp.gpt.{module}"), base)
    members = {"_advantages": staticmethod(advantages), "__module__": __name__, "__doc__": f"``{base}`` with OISD."}
    globals()[name] = type(name, (_OISDActor, parent), members)
    return globals()[name]


def checkout() -> Path:
    """Folder of NeMo-Aligner with its ``examples``: ``NEMO_ALIGNER_PATH``, else where NeMo's container has it.

    Raises:
        OISDError: it is not there.
    """
    folder = Path(os.environ.get("NEMO_ALIGNER_PATH", "/opt/NeMo-Aligner"))
    if not (folder / "examples" / "nlp" / "gpt").is_dir():
        raise OISDError(f"NEMO_ALIGNER_PATH is {str(folder)!r}: expected NeMo-Aligner's folder with examples/nlp/gpt")
    return folder


def run_recipe(recipe: str, config_dir: Path) -> None:
    """Run NeMo-Aligner's own training script with the actor replaced; Hydra's overrides come from the command line.

    Args:
        recipe: ``"reinforce"`` or ``"ppo"``.
        config_dir: where ``gpt_<recipe>_actor_oisd.yaml`` is, which inherits NeMo-Aligner's ``gpt_<recipe>_actor``.
    """
    script = checkout() / "examples" / "nlp" / "gpt" / f"train_gpt_{recipe}_actor.py"
    module, base, _ = _ACTORS[_RECIPES[recipe]]
    actors = importlib.import_module(f"nemo_aligner.models.nlp.gpt.{module}")
    # The script takes the class from its module by this name.
    setattr(actors, base, getattr(sys.modules[__name__], _RECIPES[recipe]))
    chosen = [argument.split("=")[0] for argument in sys.argv[1:]]
    if "--config-name" not in chosen and "-cn" not in chosen:
        sys.argv[1:1] = ["--config-name", f"gpt_{recipe}_actor_oisd"]
    if "--config-dir" not in chosen and "-cd" not in chosen:
        sys.argv[1:1] = ["--config-dir", str(config_dir)]
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
