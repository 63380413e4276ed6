"""For ``--spec tests.helpers.megatron_lm_spec layer_spec``: packed sequences without Transformer Engine."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_oisd.runtime.attention import UnfusedAttention
from megatron_oisd.runtime.model import SequenceParallelRMSNorm

layer_spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
layer_spec.submodules.input_layernorm = layer_spec.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
_attention = layer_spec.submodules.self_attention.submodules
_attention.q_layernorm = _attention.k_layernorm = SequenceParallelRMSNorm
_attention.core_attention = UnfusedAttention
