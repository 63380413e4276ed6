"""NeMo RL: OISD in its Megatron policy worker, by a worker extension class and with no change to its sources.

    import ray
    from megatron_oisd import OISDConfig
    from megatron_oisd.integrations import nemo_rl
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

    @ray.remote
    class OISDPolicyWorker(MegatronPolicyWorkerImpl):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            nemo_rl.install(OISDConfig(layers=(6,)))

given to ``Policy(..., worker_extension_cls_fqn="my_module.OISDPolicyWorker")``. :func:`install` wraps, in that worker's
process, ``model_forward`` (the microbatch) and ``megatron_forward_backward`` (attaches at the first training call, the
step). Evaluation and log-probability calls are left alone. ``docs/other_frameworks.md`` says what was tested.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline.microbatch import packed_borders

TRAIN = "nemo_rl.models.megatron.train"
WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker"


def microbatch_weights(data: Mapping[str, Any], length: int, packed_seq_params: Any) -> tuple[Tensor, Tensor]:
    """Mask and advantages ``[b, s]``, packed ``[1, t]``, on the CPU, aligned with the predictions.

    NeMo RL's masks and advantages stand at the token that is predicted, a prediction stands one before it.

    Args:
        data: the microbatch's rows, ``[b, S]`` each.
        length: tokens in a row of what the model is given.
        packed_seq_params: the model's, None where rows are not packed.

    Raises:
        OISDError: there are no advantages, as in other algorithms than GRPO.
    """
    if "advantages" not in data:
        raise OISDError("the batch has no 'advantages': OISD weights its losses with them; use it with GRPO")
    mask = (data["token_mask"] * data["sample_mask"].unsqueeze(-1)).float().cpu()
    rows = [torch.nn.functional.pad(tensor[:, 1:], (0, 1)) for tensor in (mask, data["advantages"].float().cpu())]
    if packed_seq_params is None:
        return rows[0][:, :length], rows[1][:, :length]
    packed = torch.zeros(1, length), torch.zeros(1, length)
    for row, (start, tokens) in enumerate(zip(packed_borders(packed_seq_params), data["input_lengths"], strict=False)):
        # The last token of a sequence predicts nothing; what stands behind it in the row is padding.
        stop = start + int(tokens) - 1
        for target, source in zip(packed, rows, strict=True):
            target[0, start:stop] = source[row, : stop - start]
    return packed


class _Training:
    """OISD on the worker's policy."""

    def __init__(self, config: OISDConfig, vocab_size: int | None) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.oisd: Any = None
        self.in_step = False

    def attach(self, model: Any) -> Any:
        from megatron.core import parallel_state

        from megatron_oisd import OISD

        if parallel_state.get_context_parallel_world_size() > 1:
            raise OISDError(
                f"context_parallel_size is {parallel_state.get_context_parallel_world_size()}: the adapter for NeMo RL "
                "was not made for it; set policy.megatron_cfg.context_parallel_size=1"
            )
        return OISD(
            self.config,
            model if isinstance(model, list) else [model],
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            vocab_size=self.vocab_size,
        )

    def megatron_forward_backward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        sequences = given.arguments["global_valid_seqs"]
        if given.arguments["forward_only"] or sequences is None:
            return original(*args, **kwargs)
        if self.oisd is None:
            self.oisd = self.attach(given.arguments["model"])
        # NeMo RL's loss is divided by the global counts already, so Megatron sums gradients and divides by nothing:
        # as if the global batch had one token.
        counts = {"num_sequences": max(int(sequences), 1), "num_tokens": 1}
        self.in_step = True
        try:
            with self.oisd.step(num_microbatches=given.arguments["num_microbatches"], **counts):
                return original(*args, **kwargs)
        finally:
            self.in_step = False

    def model_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.in_step:
            return original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        packed = given.get("packed_seq_params")
        mask, advantages = microbatch_weights(given["data_dict"], given["input_ids_cp_sharded"].shape[1], packed)
        with self.oisd.microbatch(given["model"], loss_mask=mask, advantages=advantages, packed_seq_params=packed):
            return original(*args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """OISD's metrics since the last call: a collective, to be called on every worker."""
        return {} if self.oisd is None else self.oisd.metrics()


def install(config: OISDConfig, *, vocab_size: int | None = None) -> _Training:
    """Wrap the two names in this worker's process, once; return what has the metrics.

    Args:
        config: what to add. ``aggregation="token"`` is refused: NeMo RL leaves Megatron nothing to divide by.
        vocab_size: true vocabulary size, without padding rows; None: no padding.

    Raises:
        OISDError: the configuration cannot be used, or NeMo RL lacks one of the names.
    """
    if config.enabled and config.aggregation != "sequence":
        raise OISDError(f"aggregation is {config.aggregation!r}: the adapter for NeMo RL takes 'sequence' only")
    training = _Training(config, vocab_size)
    if not config.enabled:
        return training
    places = {"model_forward": [TRAIN], "megatron_forward_backward": [TRAIN, WORKER]}
    for name, modules in places.items():
        for module in map(importlib.import_module, modules):
            original = getattr(module, name, None)
            if original is None:
                raise OISDError(
                    f"{module.__name__} has no {name}: this is another NeMo RL than docs/other_frameworks.md's"
                )
            known = getattr(original, "oisd_training", None)
            if known is not None:
                return known
            wrapper = functools.wraps(original)(functools.partial(getattr(training, name), original))
            wrapper.oisd_training = training  # type: ignore[attr-defined]
            setattr(module, name, wrapper)
    return training
