"""The logit lens on a stage: final norm and unembedding, the model's own ones or a replica of them.

On the last stage the lens *is* the model's final norm and output layer. On an earlier stage it is a replica that lives
outside the model (strict state-dict swaps stay possible, checkpoints are untouched), is refreshed from the last stage
after every optimizer step and whose gradient is added to the owner's before the gradients are reduced. With tied
embeddings the first stage already holds the unembedding: then only the norm is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_oisd.losses.numerics import Group, group_size
from megatron_oisd.pipeline.channel import Channel
from megatron_oisd.pipeline.placement import device_of


def output_weight(model: Any) -> Tensor | None:
    """The unembedding shard ``[v, h]`` that this chunk holds, or None: the output layer's, or the tied embedding's."""
    if model.share_embeddings_and_output_weights:
        if model.pre_process or model.post_process:
            return model.shared_embedding_or_output_weight()
        return None
    return model.output_layer.weight if model.post_process else None


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient where Megatron keeps it: DDP's ``main_grad`` buffer, or ``grad`` without DDP."""
    if not parameter.requires_grad:
        return
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        main_grad.add_(gradient)
    elif parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype, copy=True)
    else:
        parameter.grad.add_(gradient)


class Lens:
    """Final norm and unembedding as this stage sees them.

    Args:
        models: this rank's unwrapped chunks.
        is_owner: whether this rank holds the model's final norm and output layer.
        tp_group: tensor-parallel group; the unembedding is sharded over it.
    """

    def __init__(self, models: list[Any], *, is_owner: bool, tp_group: Group) -> None:
        self.is_owner = is_owner
        self.tp_group = tp_group
        config = models[0].config
        self.sequence_parallel = bool(config.sequence_parallel)
        weight = next((found for found in map(output_weight, models) if found is not None), None)
        self.replicates_head = not is_owner and weight is None
        if is_owner:
            self.norm: nn.Module = next(m.decoder.final_layernorm for m in models if m.post_process)
        else:
            self.norm = _build_norm(models, config)
        if weight is None:
            rows = models[0].vocab_size // group_size(tp_group)
            weight = torch.zeros(rows, config.hidden_size, dtype=config.params_dtype, device=device_of(models))
        self.head: Tensor = weight
        self._head_gradient: Tensor | None = None
        self._head_waits = False
        self._norm_gradients: list[Tensor] | None = None

    @property
    def norm_parameters(self) -> list[nn.Parameter]:
        """Parameters of the final norm or of its replica."""
        return list(self.norm.parameters())

    @property
    def owned(self) -> list[Tensor]:
        """The model's own parameters that the lens reads on this rank and adds a gradient to."""
        own = [] if self.replicates_head else [self.head]
        return [*self.norm.parameters(), *own] if self.is_owner else own

    @property
    def is_trained(self) -> bool:
        """Whether the final norm or the unembedding is trained at all (not so under a frozen trunk)."""
        return any(parameter.requires_grad for parameter in self.owned)

    def head_gradient_buffer(self) -> Tensor:
        """``[v, h]`` fp32 buffer that collects the head's lens gradient during a step."""
        if self._head_gradient is None:
            self._head_gradient = self._new_head_buffer()
        self._head_waits = True
        return self._head_gradient

    def _new_head_buffer(self) -> Tensor:
        dtype = torch.float64 if self.head.dtype == torch.float64 else torch.float32
        return torch.zeros(self.head.shape, dtype=dtype, device=self.head.device)

    def add_norm_gradients(self, gradients: list[Tensor]) -> None:
        """Collect the final norm's lens gradient of one microbatch, which every tensor-parallel rank has in full.

        ``gradients`` are those of the parameters that are trained, in their order.
        """
        given = iter(gradients)
        gradients = [next(given) if p.requires_grad else torch.zeros_like(p) for p in self.norm.parameters()]
        if self.sequence_parallel and self.tp_group is not None and self.tp_group.rank() > 0:
            # Under sequence parallelism Megatron sums the norm's gradient over the tensor-parallel ranks.
            gradients = [torch.zeros_like(gradient) for gradient in gradients]
        if self._norm_gradients is None:
            self._norm_gradients = [gradient.clone() for gradient in gradients]
            return
        for total, gradient in zip(self._norm_gradients, gradients, strict=True):
            total.add_(gradient)

    @property
    def has_gradients(self) -> bool:
        """Whether a lens gradient waits to be added to its owner."""
        return self._norm_gradients is not None or self._head_waits

    def discard_gradients(self) -> None:
        """Forget what was collected: the step was abandoned."""
        self._head_gradient = self._norm_gradients = None
        self._head_waits = False

    def refresh(self, channels: dict[int, Channel], remote_heads: dict[int, bool]) -> None:
        """Copy the owner's final norm and, where it is not there already, unembedding to the replicas.

        Args:
            channels: this rank's channels by student stage.
            remote_heads: whether the lens of that stage needs the unembedding too.
        """
        for stage, channel in channels.items():
            tensors = [parameter.data for parameter in self.norm.parameters()]
            if remote_heads[stage]:
                tensors.append(self.head.data)
            for tensor in tensors:
                channel.move(tensor, towards_student=True)

    def return_gradients(self, channels: dict[int, Channel], remote_heads: dict[int, bool]) -> None:
        """Add every lens gradient of the step to the parameters that own it; before gradients are reduced over DP.

        The student's stage always sends, also zeros: the last stage cannot know whether it had a token.
        """
        for stage, channel in channels.items():
            norms = self._norm_gradients
            if self.is_owner or norms is None:
                norms = [torch.zeros_like(p.data) for p in self.norm.parameters()]
            for gradient, parameter in zip(norms, self.norm.parameters(), strict=True):
                channel.move(gradient, towards_student=False)
                if self.is_owner:
                    add_gradient(parameter, gradient)
            if remote_heads[stage]:
                head = self._new_head_buffer() if self.is_owner else self.head_gradient_buffer()
                channel.move(head, towards_student=False)
                if self.is_owner:
                    add_gradient(self.head, head)
        if self.is_owner and self._norm_gradients is not None:
            for parameter, gradient in zip(self.norm.parameters(), self._norm_gradients, strict=True):
                add_gradient(parameter, gradient)
        if not self.replicates_head and self._head_gradient is not None:
            # The model's own unembedding; Megatron sums the two ends of tied embeddings afterwards.
            add_gradient(self.head, self._head_gradient)
        if self._head_gradient is not None:
            self._head_gradient.zero_()
        self._norm_gradients, self._head_waits = None, False


def _build_norm(models: list[Any], config: Any) -> nn.Module:
    from megatron.core.transformer.spec_utils import build_module

    norm = build_module(
        models[0].decoder.submodules.layer_norm,
        config=config,
        hidden_size=config.hidden_size,
        eps=config.layernorm_epsilon,
    )
    return norm.to(device=device_of(models), dtype=config.params_dtype)
