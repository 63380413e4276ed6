"""The mathematics: GRPO and the two OISD losses. Nothing here imports Megatron or the rest of the package.

Shape legend, used in every file of this folder:

========  ==========================================================================================
``s``     sequence length
``b``     sequences in a microbatch
``N``     selected tokens (response tokens with a non-zero weight), flattened
``V``     vocabulary size; ``v`` its shard on this tensor-parallel rank (the sharded axis)
``h``     hidden size
``np``    query heads, ``ng`` key/value heads (GQA), both per tensor-parallel rank; ``d`` head dimension
``Q``     sampled query positions, ``K`` sampled keys of each
========  ==========================================================================================
"""
