"""A core attention in plain PyTorch for the layouts that Megatron's own unfused one refuses.

Megatron's ``DotProductAttention`` takes neither packed (THD) sequences nor context parallelism and leaves both to
Transformer Engine, which needs a GPU. This one takes them anywhere, at the cost of whole ``[s, s]`` scores: for tests
and for trying layouts out on a CPU, not for speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn

from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline.checks import shared_sliding_window
from megatron_oisd.pipeline.microbatch import context_positions, packed_borders


class UnfusedAttention(nn.Module):
    """Causal softmax attention; put it in a layer spec's ``core_attention``.

    Grouped queries, sliding windows (``window_size``), value heads of another width (MLA), packed sequences, and
    context parallelism by gathering keys and values of all ranks. Softmax in at least fp32. No dropout, no attention
    bias, no sinks.

    Args:
        config: Megatron's configuration.
        layer_number: counted from 1.
        attn_mask_type: causal; others are refused.
        attention_type: not used.
        attention_dropout: must be 0.
        softmax_scale: None for ``1 / sqrt(head dimension)``.
        cp_comm_type: not used.
        pg_collection: process groups; None for Megatron's global ones.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if "causal" not in attn_mask_type.name:
            raise OISDError(f"attn_mask_type is {attn_mask_type.name}: UnfusedAttention is causal only")
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise OISDError(f"attention_dropout is {dropout}: UnfusedAttention has none, set it to 0")
        self.config = config
        self.softmax_scale = softmax_scale
        window = shared_sliding_window(config, (layer_number,))
        self.left = -1 if window is None else window[0]
        self.cp_group = (
            parallel_state.get_context_parallel_group() if pg_collection is None else getattr(pg_collection, "cp", None)
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[s, b, np, d]``, packed ``[t, np, d]``.
            key: ``[s, b, ng, d]``, packed ``[t, ng, d]``.
            value: ``[s, b, ng, dv]``, packed ``[t, ng, dv]``.
            attention_mask: ignored: attention is causal within each sequence.
            attn_mask_type: ignored.
            attention_bias: must be None.
            packed_seq_params: of packed sequences.

        Returns:
            ``[s, b, np * dv]``, packed ``[t, np * dv]``.
        """
        if attention_bias is not None:
            raise OISDError("attention_bias is set: UnfusedAttention has none")
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        size = 1 if self.cp_group is None else self.cp_group.size()
        rank = 0 if self.cp_group is None else self.cp_group.rank()
        length = query.shape[0] * size
        borders = packed_borders(packed_seq_params) if packed else None
        positions = context_positions(length, borders, size)
        if size > 1:
            key, value = (
                tensor_parallel.gather_from_sequence_parallel_region(tensor.contiguous(), group=self.cp_group)
                for tensor in (key, value)
            )
        allowed = self._allowed(positions[rank], torch.cat(positions), borders, length).to(query.device)
        repeat = query.shape[2] // key.shape[2]
        q = query.permute(1, 2, 0, 3)
        k, v = (tensor.repeat_interleave(repeat, dim=2).permute(1, 2, 0, 3) for tensor in (key, value))
        scale = 1.0 / math.sqrt(query.shape[-1]) if self.softmax_scale is None else self.softmax_scale
        scores = q @ k.transpose(2, 3) * scale
        scores = scores if scores.dtype == torch.float64 else scores.float()
        context = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype) @ v
        result = context.permute(2, 0, 1, 3).flatten(2)
        return result.squeeze(1) if packed else result.contiguous()

    def _allowed(self, queries: Tensor, keys: Tensor, borders: list[int] | None, length: int) -> Tensor:
        """``[sq, sk]`` bool: which keys each query sees."""
        query, key = queries.unsqueeze(1), keys.unsqueeze(0)
        allowed = key <= query
        if self.left >= 0:
            allowed &= key >= query - self.left
        if borders is not None:
            segment = torch.searchsorted(torch.tensor(borders[1:]), torch.arange(length), right=True)
            allowed &= segment[key] == segment[query]
        return allowed
