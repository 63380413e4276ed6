"""Runs transformers' own model with one layer's weights in memory at a time, and shows what happens inside each layer.

Shapes: b prompts, s positions (padded on the right), h hidden size, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_oisd.analysis.checkpoints import Checkpoint
from megatron_oisd.convert.families import expand, numbered
from megatron_oisd.convert.output import brief
from megatron_oisd.convert.report import available_memory
from megatron_oisd.errors import OISDError

RESIDENT_SHARE = 0.4
"""Weights stay in memory between passes where they take up less of what is free than this."""


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """What one decoder layer read and wrote: ``[b, s, h]``, values at padding undefined."""

    layer: int
    """Counted from 1."""
    layer_input: Tensor
    attention_input: Tensor
    """After the layer's own norm."""
    attention_output: Tensor
    """What attention adds to the residual stream."""
    ffn_input: Tensor
    """After the layer's second norm."""
    ffn_output: Tensor
    layer_output: Tensor
    attention: Tensor
    """``[b, H, s, s]``: probabilities of each query (third axis) over keys (last)."""

    @property
    def after_attention(self) -> Tensor:
        """The residual stream between attention and FFN."""
        return self.layer_input + self.attention_output


@dataclass
class _Seen:
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StreamedModel:
    """A causal language model whose layers are read from the checkpoint as the forward pass reaches them.

    Embedding, final norm and unembedding stay in memory, and so do all layers where they easily fit. Attention is
    computed eagerly, since its probabilities are wanted.

    Args:
        checkpoint: from :func:`megatron_oisd.analysis.checkpoints.open_checkpoint`.
        device: where to compute.
        dtype: of weights and activations inside the layers; the lens is float32 always.
        resident: keep layers in memory; None decides by what is free.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        resident: bool | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        try:
            config = AutoConfig.from_pretrained(checkpoint.hf_directory, trust_remote_code=False)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation="eager", dtype=dtype, trust_remote_code=False
                )
        except Exception as error:  # transformers raises many kinds
            raise OISDError(f"transformers cannot build {checkpoint.hf_directory} ({brief(error)})") from error
        self._fused = _fused_names(checkpoint)
        body = model.eval().model
        body.rotary_emb = type(body.rotary_emb)(config=config).to(self.device)  # buffers, and none in checkpoints
        self._body: Any = body
        self._load(body.embed_tokens, "model.embed_tokens")
        self._load(body.norm, "model.norm")
        tied = not checkpoint.arguments.untie_embeddings_and_output_weights
        self.unembedding = self._tensor("model.embed_tokens.weight" if tied else "lm_head.weight", torch.float32)
        """``[V, h]`` float32."""
        self.num_layers: int = checkpoint.arguments.num_layers
        if resident is None:
            size = sum(parameter.numel() for parameter in body.layers.parameters()) * dtype.itemsize
            resident = size < RESIDENT_SHARE * _free_memory(self.device)
        self._resident = resident

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the model's final norm to ``[..., h]``, in float32."""
        return self._body.norm(hidden.to(self.dtype)).float()

    @torch.no_grad()
    def run(self, token_ids: Tensor, lengths: list[int], visit: Callable[[LayerActivations], None]) -> Tensor:
        """Run the layers in turn and call ``visit`` after each.

        Args:
            token_ids: ``[b, s]``, padded on the right with any valid id.
            lengths: number of true tokens of each row.
            visit: called with layer 1, 2, ...; it must not keep what it is given.

        Returns:
            The last layer's output after the final norm, ``[b, s, h]`` float32.
        """
        positions = torch.arange(token_ids.shape[1])
        mask = (positions < torch.tensor(lengths)[:, None]).long()
        handles = [
            handle for number, layer in enumerate(self._body.layers) for handle in self._hooks(number, layer, visit)
        ]
        try:
            output = self._body(
                input_ids=token_ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False
            )
        finally:
            for handle in handles:
                handle.remove()
        return output.last_hidden_state.float()

    def _hooks(self, number: int, layer: nn.Module, visit: Callable[[LayerActivations], None]) -> list[Any]:
        seen = _Seen()

        def load(module: nn.Module, args: Any, kwargs: Any) -> None:
            if any(parameter.is_meta for parameter in module.parameters()):
                self._load(module, f"model.layers.{number}")
            seen.tensors["layer_input"] = _first(args, kwargs)

        def attention(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.tensors["attention_input"] = _first(args, kwargs)
            seen.tensors["attention_output"], seen.tensors["attention"] = output[0], output[1]

        def ffn(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.tensors["ffn_input"] = _first(args, kwargs)
            seen.tensors["ffn_output"] = output[0] if isinstance(output, tuple) else output  # experts: and the router

        def finish(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.tensors["layer_output"] = output[0] if isinstance(output, tuple) else output
            visit(LayerActivations(layer=number + 1, **seen.tensors))
            seen.tensors.clear()
            if not self._resident:
                module.to("meta")

        parts: Any = layer
        return [
            layer.register_forward_pre_hook(load, with_kwargs=True),
            parts.self_attn.register_forward_hook(attention, with_kwargs=True),
            parts.mlp.register_forward_hook(ffn, with_kwargs=True),
            layer.register_forward_hook(finish, with_kwargs=True),
        ]

    def _load(self, module: nn.Module, prefix: str) -> None:
        weights = {name: self._tensor(f"{prefix}.{name}", self.dtype) for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        tensors = self.checkpoint.tensors
        if name in self._fused:
            experts = [torch.cat([tensors[part] for part in parts]) for parts in self._fused[name]]
            return torch.stack(experts).to(self.device, dtype)
        try:
            return tensors[name].to(self.device, dtype)
        except KeyError:
            raise OISDError(
                f"{self.checkpoint.hf_directory}: no tensor {name}, which transformers' model has: another version of "
                f"transformers names it otherwise"
            ) from None


def _first(args: Any, kwargs: Any) -> Tensor:
    """A module's first input: transformers passes it by position or as ``hidden_states``."""
    tensor = args[0] if args else kwargs["hidden_states"]
    assert isinstance(tensor, Tensor)
    return tensor


def _fused_names(checkpoint: Checkpoint) -> dict[str, list[list[str]]]:
    """Names under which transformers 5 holds all experts of a layer, with the tensors by expert and part."""
    found: dict[str, dict[int, dict[int, str]]] = {}
    for rule, layer in expand(checkpoint.arguments):
        for source in rule.hf:
            if rule.expert is not None and source.fused is not None:
                parts = found.setdefault(numbered(source.fused.name, layer), {}).setdefault(rule.expert, {})
                parts[source.fused.part] = numbered(source.name, layer)
    return {
        name: [[parts[part] for part in sorted(parts)] for _, parts in sorted(experts.items())]
        for name, experts in found.items()
    }


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
